#include "core/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edge {
namespace {
// About 50 us: longer than the gap between two ops of a token, far shorter than a scheduler slice.
constexpr int kSpins = 4000;
// Below the shortest slice of a scheduler: who gives way on time is not stopped in the middle of a piece.
constexpr std::chrono::microseconds kTurn{1000};
constexpr uint64_t kOpen = 1 << 16;
constexpr uint64_t kJoined = kOpen - 1;
constexpr uint64_t kGeneration = 1 << 17;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A worker's manners. Where others want its core, it gives way between two jobs, because a worker stopped within one stalls
// the caller for a whole slice; and it leaves the caller's core, to which schedulers move it when others take its own: two
// threads that take turns on one core wait for each other at every job.
class Courtesy {
 public:
#if defined(__linux__)
  Courtesy() { known_ = sched_getaffinity(0, sizeof allowed_, &allowed_) == 0; }

  void between_jobs(int caller_cpu) {
    const auto now = std::chrono::steady_clock::now();
    if (now - since_ < kTurn) return;
    if (known_ && sched_getcpu() == caller_cpu) leave(caller_cpu);
    std::this_thread::yield();
    since_ = std::chrono::steady_clock::now();
  }

 private:
  void leave(int cpu) {
    cpu_set_t others = allowed_;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0) (void)sched_setaffinity(0, sizeof others, &others);
  }

  cpu_set_t allowed_;
  bool known_;
#else
  void between_jobs(int) {
    const auto now = std::chrono::steady_clock::now();
    if (now - since_ < kTurn) return;
    std::this_thread::yield();
    since_ = std::chrono::steady_clock::now();
  }

 private:
#endif
  std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

int this_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
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
  caller_cpu_.store(this_cpu(), std::memory_order_relaxed);
  const uint64_t generation = state_.load(std::memory_order_relaxed) / kGeneration + 1;
  state_.store(generation * kGeneration | kOpen);
  if (n_sleeping_.load() > 0) {
    // Through the lock, or a worker between its last look and its sleep would miss the job.
    { std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }
  drain(0);
  state_.fetch_and(~kOpen);
  uint64_t state = state_.load(std::memory_order_acquire);
  for (int spins = 0; (state & kJoined) != 0; ++spins) {
    if (spins < kSpins) relax();
    else state_.wait(state, std::memory_order_acquire);
    state = state_.load(std::memory_order_acquire);
  }
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;  // generation
  Courtesy courtesy;
  const auto ready = [&](uint64_t state) { return (state & kOpen) != 0 && state / kGeneration != seen; };
  for (;;) {
    uint64_t state = state_.load(std::memory_order_acquire);
    for (int spins = 0; !ready(state) && spins < kSpins && !stop_.load(std::memory_order_relaxed); ++spins) {
      relax();
      state = state_.load(std::memory_order_acquire);
    }
    if (!ready(state)) {
      std::unique_lock lock(mutex_);
      n_sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return stop_.load() || ready(state = state_.load()); });
      n_sleeping_.fetch_sub(1);
    }
    if (stop_.load()) return;
    if (!state_.compare_exchange_strong(state, state + 1)) continue;  // closed, or another joined: look again
    seen = state / kGeneration;
    drain(thread);
    state_.fetch_sub(1, std::memory_order_release);
    state_.notify_one();
    courtesy.between_jobs(caller_cpu_.load(std::memory_order_relaxed));
  }
}

}  // namespace edge
