// The only source of memory above 64 KiB: every block has a tag, and the sum never passes the limit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "core/status.h"

namespace edge {

class Budget;

// An owned piece of budgeted memory, zero-filled, aligned to 4096 (2 MiB pages are asked for from 2 MiB on).
class Block {
 public:
  Block() = default;
  Block(Block&& other) noexcept { *this = std::move(other); }
  Block& operator=(Block&& other) noexcept;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { release(); }

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }
  template <typename T>
  T* as() const { return reinterpret_cast<T*>(data_); }
  void release();
  // Has the system make all pages now, where it can: otherwise it makes and clears them as they are written to, within
  // whatever is being timed then.
  void populate();

 private:
  friend class Budget;
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;  // as charged: a multiple of 4096
  Budget* budget_ = nullptr;
  std::string tag_;
};

class Budget {
 public:
  explicit Budget(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  // kOverBudget names the tag, the bytes asked for, those in use and the limit.
  // The Budget must outlive its blocks.
  Result<Block> reserve(uint64_t bytes, const char* tag);

  // Makes a block of this budget longer or shorter. What both lengths hold stays; it may lie elsewhere afterwards. What is
  // added is zero. On error (kOverBudget) the block is as it was.
  Status resize(Block* block, uint64_t bytes);

  uint64_t limit_bytes() const;
  // May be less than what is in use: then nothing more is given until enough has come back.
  void set_limit(uint64_t limit_bytes);
  uint64_t used_bytes() const;
  uint64_t peak_bytes() const;
  std::map<std::string, uint64_t> report() const;  // tag -> bytes in use

 private:
  friend class Block;
  void give_back(const std::string& tag, uint64_t bytes);
  // mutex_ held.
  Status check_room(uint64_t bytes, const char* tag) const;
  void charge(uint64_t bytes, const std::string& tag);

  uint64_t limit_bytes_;
  mutable std::mutex mutex_;
  uint64_t used_bytes_ = 0;
  uint64_t peak_bytes_ = 0;
  std::map<std::string, uint64_t> by_tag_;
};

}  // namespace edge
