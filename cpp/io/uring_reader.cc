#include <vector>

#include "io/engines.h"
#include "io/piece_queue.h"
#include "io/uring_ring.h"

namespace edge {
namespace {

class UringReader final : public BlockReader {
 public:
  UringReader(ReadFile file, FaultPlan faults, int depth, std::unique_ptr<UringRing> ring)
      : file_(std::move(file)),
        faults_(std::move(faults)),
        queue_(&file_),
        ring_(std::move(ring)),
        pieces_(static_cast<size_t>(depth)) {
    for (size_t slot = 0; slot < pieces_.size(); ++slot) free_.push_back(slot);
  }

  ~UringReader() override {
    // The kernel still writes into the callers' buffers.
    while (n_flying() > 0 && ring_->enter(1).ok()) {
      for (UringCompletion landed; ring_->pop(&landed);) free_.push_back(landed.user_data);
    }
  }

  Status submit(const ReadRequest& request) override {
    EDGE_TRY(queue_.check(request));
    while (queue_.n_open() >= pieces_.size()) EDGE_TRY(turn(1));
    queue_.add(request);
    return turn(0);
  }

  Status submit_all(std::span<const ReadRequest> requests) override {
    for (const ReadRequest& request : requests) EDGE_TRY(queue_.check(request));
    for (const ReadRequest& request : requests) {
      while (queue_.n_open() >= pieces_.size()) EDGE_TRY(turn(1));
      queue_.add(request);
    }
    return turn(0);
  }

  Result<ReadCompletion> wait() override {
    for (;;) {
      if (std::optional<ReadCompletion> completion = queue_.take()) return std::move(*completion);
      if (queue_.n_open() == 0) return error(Code::kBadArgument, "wait: no read is in flight");
      EDGE_TRY(turn(1));
    }
  }

  Result<std::optional<ReadCompletion>> poll() override {
    if (!queue_.has_finished()) EDGE_TRY(turn(0));
    return queue_.take();
  }

  const char* engine() const override { return "io_uring"; }
  bool direct() const override { return file_.direct(); }
  int depth() const override { return static_cast<int>(pieces_.size()); }
  uint64_t align() const override { return file_.align(); }
  uint64_t file_bytes() const override { return file_.bytes(); }

 private:
  size_t n_flying() const { return pieces_.size() - free_.size(); }

  // Takes what has landed, fills the ring, and waits for `min_complete` when nothing had landed.
  Status turn(uint32_t min_complete) {
    const bool any = reap();
    bool pushed = false;
    for (Piece piece; !free_.empty() && queue_.next(&piece); pushed = true) {
      const size_t slot = free_.back();
      free_.pop_back();
      pieces_[slot] = piece;
      ring_->push_read(file_.fd(), piece.offset, piece.into, static_cast<uint32_t>(piece.bytes), slot);
    }
    const uint32_t wait_for = any || n_flying() == 0 ? 0 : min_complete;
    if (pushed || wait_for > 0) EDGE_TRY(ring_->enter(wait_for));
    reap();
    return {};
  }

  bool reap() {
    bool any = false;
    for (UringCompletion landed; ring_->pop(&landed); any = true) {
      const Piece piece = pieces_[landed.user_data];
      free_.push_back(landed.user_data);
      file_.drop(piece.offset, piece.bytes);
      queue_.landed(piece, faults_.apply(piece.read_index, landed.result, piece.into));
    }
    bytes_read_.store(queue_.bytes_landed(), std::memory_order_relaxed);
    return any;
  }

  ReadFile file_;
  FaultPlan faults_;
  PieceQueue queue_;
  std::unique_ptr<UringRing> ring_;
  std::vector<Piece> pieces_;  // by slot
  std::vector<size_t> free_;
};

}  // namespace

Status uring_available() {
  static const Status status = [] {
    Result<std::unique_ptr<UringRing>> ring = UringRing::create(1);
    return ring.ok() ? Status() : ring.status();
  }();
  return status;
}

Result<std::unique_ptr<BlockReader>> open_uring_reader(ReadFile file, FaultPlan faults, int depth) {
  EDGE_ASSIGN(std::unique_ptr<UringRing> ring, UringRing::create(static_cast<uint32_t>(depth)));
  return std::unique_ptr<BlockReader>(new UringReader(std::move(file), std::move(faults), depth, std::move(ring)));
}

}  // namespace edge
