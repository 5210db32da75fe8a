// A fixed set of workers that spin briefly, then sleep: a busy neighbour must not stall a barrier for long.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace edge {

// Rows that are worth a piece of their own where each takes a step over so many values: waking another core and waiting for
// it takes about as long as a norm over 8,192.
inline int64_t row_grain(int64_t values_per_row) {
  constexpr int64_t kPieceValues = 8192;
  return std::max<int64_t>(1, kPieceValues / std::max<int64_t>(1, values_per_row));
}

class ThreadPool {
 public:
  // n_threads counts the caller: 1 runs everything inline.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(begin, end, thread) over [0, n_items) in pieces of `grain`, taken dynamically; returns when all are done.
  // Which thread takes which piece is not defined, so no result may depend on it. Not reentrant.
  template <typename Fn>
  void parallel(int64_t n_items, int64_t grain, Fn&& fn) {
    using Callable = std::remove_reference_t<Fn>;
    run(n_items, grain, [](void* context, int64_t begin, int64_t end, int thread) {
      (*static_cast<Callable*>(context))(begin, end, thread);
    }, const_cast<std::remove_const_t<Callable>*>(&fn));
  }

 private:
  using Call = void (*)(void* context, int64_t begin, int64_t end, int thread);
  void run(int64_t n_items, int64_t grain, Call call, void* context);
  void work(int thread);
  void drain(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> stop_{false};
  std::atomic<int> n_sleeping_{0};
  // Generation of the job in the high bits, whether it may still be joined, and how many workers have joined it. The
  // caller waits only for those: a worker the system has not scheduled yet costs nothing.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  std::atomic<int> caller_cpu_{-1};
  // The current job: written while nobody has joined and nobody can.
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t n_items_ = 0;
  int64_t grain_ = 1;
};

}  // namespace edge
