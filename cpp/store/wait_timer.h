// Adds the time it lives to a counter.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace edge {

class WaitTimer {
 public:
  explicit WaitTimer(std::atomic<uint64_t>* total_ns) : total_ns_(total_ns) {}
  ~WaitTimer() {
    *total_ns_ += static_cast<uint64_t>(std::chrono::nanoseconds(std::chrono::steady_clock::now() - start_).count());
  }

 private:
  std::atomic<uint64_t>* total_ns_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace edge
