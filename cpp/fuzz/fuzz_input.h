// Taking typed values from a fuzzer's bytes, and stopping on a broken promise.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

namespace edge::fuzz {

// A promise of the code under test; a fuzzer needs the process to end where it is broken.
#define FUZZ_REQUIRE(condition)                                                       \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);    \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

class Input {
 public:
  Input(const uint8_t* data, size_t size) : rest_(data, size) {}

  bool empty() const { return rest_.empty(); }

  // Zeros once the input is used up.
  template <typename T>
  T take() {
    T value{};
    const size_t n = std::min(sizeof value, rest_.size());
    if (n > 0) std::memcpy(&value, rest_.data(), n);
    rest_ = rest_.subspan(n);
    return value;
  }

  // Overwrites up to eight bytes at a time at offsets the input names, until it is used up.
  void patch(std::span<std::byte> target) {
    while (!rest_.empty() && !target.empty()) {
      const size_t at = take<uint16_t>() % target.size();
      const size_t n = std::min({size_t{1} + take<uint8_t>() % 8, rest_.size(), target.size() - at});
      if (n > 0) std::memcpy(target.data() + at, rest_.data(), n);
      rest_ = rest_.subspan(n);
    }
  }

  // The rest of the input, repeated to fill `target`.
  void fill(std::span<std::byte> target) {
    for (size_t at = 0; at < target.size() && !rest_.empty(); at += rest_.size())
      std::memcpy(target.data() + at, rest_.data(), std::min(rest_.size(), target.size() - at));
  }

 private:
  std::span<const uint8_t> rest_;
};

}  // namespace edge::fuzz
