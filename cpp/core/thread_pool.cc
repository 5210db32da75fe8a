#include "core/thread_pool.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edge {
namespace {
// About 50 us: longer than the gap between two ops of a token, far shorter than a scheduler slice.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  for (int thread = 1; thread < n_threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_.store(true);
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::drain(int thread) {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= n_items_) return;
    call_(context_, begin, std::min(begin + grain_, n_items_), thread);
  }
}

void ThreadPool::run(int64_t n_items, int64_t grain, Call call, void* context) {
  if (n_items <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (workers_.empty() || n_items <= grain) {
    call(context, 0, n_items, 0);
    return;
  }
  call_ = call;
  context_ = context;
  n_items_ = n_items;
  grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  n_running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);  // a worker between its last look and its sleep must not miss the job
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  drain(0);
  for (int spins = 0; n_running_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) relax();
    else std::this_thread::yield();
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen && spins < kSpins) {
      relax();
      ++spins;
    }
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    drain(thread);
    n_running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace edge
