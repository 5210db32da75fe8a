// A temporary file without a name: pieces are written once and read back by a BlockReader. The system frees it when the
// process ends, however it ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/block_reader.h"
#include "io/fault_plan.h"

namespace edge {

struct ScratchOptions {
  std::string folder;  // on a drive: a file in a memory file system would take the memory it is to save
  ReaderOptions reader;
  std::string write_fault;  // a FaultPlan of the writes; empty = EDGE_IO_WRITE_FAULT, else none
};

class ScratchFile {
 public:
  // `bytes` is its size; no space is taken before it is written. kDiskError when the folder takes no file.
  static Result<std::unique_ptr<ScratchFile>> create(const ScratchOptions& options, uint64_t bytes);
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  // Writes the pieces side by side from `offset` on; addresses and sizes are multiples of 4096. kDiskError says what the
  // system said (no space left among it); what the places held before is then lost.
  Status write(uint64_t offset, std::span<const std::span<const std::byte>> pieces);
  BlockReader& reader() { return *reader_; }

  bool direct() const { return direct_; }
  // From any thread.
  uint64_t bytes_written() const { return bytes_written_.load(std::memory_order_relaxed); }

 private:
  ScratchFile() = default;
  Status open(const ScratchOptions& options, uint64_t bytes);

  std::string where_;  // the folder, for messages
  int fd_ = -1;
  bool direct_ = false;
  FaultPlan faults_;
  uint64_t n_writes_ = 0;
  std::atomic<uint64_t> bytes_written_{0};  // a figure: nothing is ordered by it
  std::unique_ptr<BlockReader> reader_;
};

}  // namespace edge
