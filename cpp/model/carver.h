// Pieces of one block of memory, for scratch whose sizes must be known before it is reserved.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

// Hands out aligned pieces; with no memory behind it only the offsets move, which is how sizes are known beforehand.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  std::byte* take(uint64_t bytes) {
    std::byte* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    return piece;
  }
  float* floats(int64_t n) { return array<float>(n); }
  template <typename T>
  T* array(int64_t n) {
    return reinterpret_cast<T*>(take(static_cast<uint64_t>(n) * sizeof(T)));
  }
  uint64_t used() const { return used_; }

 private:
  std::byte* base_;
  uint64_t used_ = 0;
};

}  // namespace edge
