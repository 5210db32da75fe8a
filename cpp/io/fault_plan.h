// Faults on purpose: what a failing drive would answer, decided per read, below the code that must survive it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace edge {

// "kind@n[+][:argument]", several joined by commas, e.g. "eio@3", "flip@0:77", "delay@2+:20".
//   n         the n-th read the reader issues, from 0; "+" = that one and every later one
//   eio       the read fails with EIO
//   enospc    it fails with ENOSPC: for writes, which take the same plans (flips aside)
//   again     the read answers EAGAIN
//   short     half of the bytes arrive, of less than two pages a few
//   zero      no bytes arrive, as past the end of a file that shrank
//   flip:bit  one bit of what was read is turned over (bit modulo the bits read, 0 when absent)
//   delay:ms  the answer comes later
class FaultPlan {
 public:
  FaultPlan() = default;
  static Result<FaultPlan> parse(const std::string& text);

  bool empty() const { return faults_.empty(); }
  // `result` as pread gives it, or -errno; returns what the reader shall see instead. Without `data` nothing is flipped.
  int64_t apply(uint64_t read_index, int64_t result, std::byte* data) const;

 private:
  enum class Kind { kEio, kNoSpace, kAgain, kShort, kZero, kFlip, kDelay };
  struct Fault {
    Kind kind = Kind::kEio;
    uint64_t at = 0;
    bool forever = false;
    uint64_t argument = 0;
  };
  std::vector<Fault> faults_;
};

}  // namespace edge
