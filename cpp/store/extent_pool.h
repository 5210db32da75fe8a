// Which parts of one block of memory are taken: first fit over page-aligned extents. Not locked.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace edge {

class ExtentPool {
 public:
  explicit ExtentPool(uint64_t bytes) : bytes_(bytes) {}

  // Offset of `bytes` (a multiple of 4096) in a row; none where no gap is that long.
  std::optional<uint64_t> take(uint64_t bytes) {
    uint64_t gap = 0;
    for (const auto& [offset, length] : taken_) {
      if (offset - gap >= bytes) break;
      gap = offset + length;
    }
    if (bytes > bytes_ - gap) return std::nullopt;
    taken_.emplace(gap, bytes);
    return gap;
  }
  // Gives back all but the first `bytes` (a multiple of 4096) of an extent.
  void shrink(uint64_t offset, uint64_t bytes) { taken_[offset] = bytes; }
  void give_back(uint64_t offset) { taken_.erase(offset); }
  // No extent may end behind the new end.
  void resize(uint64_t bytes) { bytes_ = bytes; }

 private:
  uint64_t bytes_;
  std::map<uint64_t, uint64_t> taken_;  // offset -> bytes
};

}  // namespace edge
