// Memory that nobody has touched yet, made ready by several threads.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "store/weight_store.h"

namespace edge {

// Makes the pages of a block from its end on. The system clears every fresh page, which takes longer than reading it from a
// fast drive, and a direct read has that done by the thread that submits. Where the system belongs to a host, memory that
// goes unused for seconds is the host's again, and dear: what is needed is better taken at once.
class FreshPages {
 public:
  // Begins in so many threads; they end early when `progress` (or null) says that loading is cancelled.
  FreshPages(std::byte* data, uint64_t bytes, size_t n_threads, const LoadProgress* progress)
      : data_(data), progress_(progress), left_(static_cast<int64_t>(bytes)) {
    for (size_t i = 0; i < n_threads; ++i) threads_.emplace_back([this] { make(); });
  }
  // Pages not begun come as they are touched.
  ~FreshPages() {
    left_ = 0;
    for (std::thread& thread : threads_) thread.join();
  }
  FreshPages(const FreshPages&) = delete;
  FreshPages& operator=(const FreshPages&) = delete;

  // The caller helps, until none is left to begin.
  void make() {
#ifdef MADV_POPULATE_WRITE
    while (progress_ == nullptr || !progress_->cancel) {
      const int64_t end = left_.fetch_sub(kPieceBytes), begin = std::max<int64_t>(end - kPieceBytes, 0);
      // Where the system does not know this, pages come as they are touched.
      if (end <= 0 || madvise(data_ + begin, static_cast<size_t>(end - begin), MADV_POPULATE_WRITE) != 0) return;
    }
#endif
  }

 private:
  static constexpr int64_t kPieceBytes = 8 << 20;

  std::byte* data_;
  const LoadProgress* progress_;
  std::atomic<int64_t> left_;
  std::vector<std::thread> threads_;
};

}  // namespace edge
