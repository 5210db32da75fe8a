#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/engines.h"
#include "io/piece_queue.h"

namespace edge {
namespace {

// Eight 1 MiB reads keep a flash drive busy. Cached pages are copied by the cores: more threads than cores only queue, and
// one read at a time is copied by who asks for it.
constexpr int kMaxThreads = 8;

class PreadReader final : public BlockReader {
 public:
  PreadReader(ReadFile file, FaultPlan faults, int depth)
      : file_(std::move(file)), faults_(std::move(faults)), queue_(&file_), depth_(depth) {
    int n_threads = std::min(depth, kMaxThreads);
    const int n_cores = static_cast<int>(std::thread::hardware_concurrency());
    if (file_.keep_cache()) n_threads = depth == 1 ? 0 : std::clamp(n_cores, 1, n_threads);
    for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~PreadReader() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Status submit(const ReadRequest& request) override {
    EDGE_TRY(queue_.check(request));
    {
      std::unique_lock lock(mutex_);
      done_.wait(lock, [&] { return queue_.n_open() < static_cast<size_t>(depth_); });
      queue_.add(request);
      if (threads_.empty()) {
        while (read_next(lock)) {}
        return {};
      }
    }
    if (request.bytes > kPieceBytes) work_.notify_all();
    else work_.notify_one();
    return {};
  }

  Result<ReadCompletion> wait() override {
    std::unique_lock lock(mutex_);
    if (queue_.n_open() == 0 && !queue_.has_finished()) return error(Code::kBadArgument, "wait: no read is in flight");
    done_.wait(lock, [&] { return queue_.has_finished(); });
    bytes_read_.store(queue_.bytes_landed(), std::memory_order_relaxed);
    return std::move(*queue_.take());
  }

  Result<std::optional<ReadCompletion>> poll() override {
    std::lock_guard lock(mutex_);
    bytes_read_.store(queue_.bytes_landed(), std::memory_order_relaxed);
    return queue_.take();
  }

  const char* engine() const override { return "pread"; }
  bool direct() const override { return file_.direct(); }
  int depth() const override { return depth_; }
  uint64_t align() const override { return file_.align(); }
  uint64_t file_bytes() const override { return file_.bytes(); }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      if (!read_next(lock)) work_.wait(lock);
    }
  }

  // False when no piece waits.
  bool read_next(std::unique_lock<std::mutex>& lock) {
    Piece piece;
    if (!queue_.next(&piece)) return false;
    lock.unlock();
    const ssize_t got = pread(file_.fd(), piece.into, piece.bytes, static_cast<off_t>(piece.offset));
    const int64_t result = faults_.apply(piece.read_index, got < 0 ? -errno : got, piece.into);
    file_.drop(piece.offset, piece.bytes);
    lock.lock();
    queue_.landed(piece, result);
    if (queue_.has_finished()) done_.notify_one();
    return true;
  }

  ReadFile file_;
  FaultPlan faults_;
  PieceQueue queue_;  // guarded by mutex_
  const int depth_;
  std::mutex mutex_;
  std::condition_variable work_;  // a piece waits, or stop
  std::condition_variable done_;  // a request finished; one thread waits
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<BlockReader>> open_pread_reader(ReadFile file, FaultPlan faults, int depth) {
  return std::unique_ptr<BlockReader>(new PreadReader(std::move(file), std::move(faults), depth));
}

}  // namespace edge
