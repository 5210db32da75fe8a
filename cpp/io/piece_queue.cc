#include "io/piece_queue.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace edge {
namespace {
constexpr uint64_t kMaxRequestBytes = uint64_t{1} << 30;
constexpr uint32_t kMaxRetries = 100;  // in a row, of EINTR or EAGAIN

unsigned long long ull(uint64_t value) { return value; }
}  // namespace

Status PieceQueue::check(const ReadRequest& request) const {
  const uint64_t align = file_->align();
  if (request.offset % align != 0 || request.bytes % align != 0 ||
      reinterpret_cast<uintptr_t>(request.into) % align != 0 || request.into == nullptr) {
    return error(Code::kBadArgument,
                 "read of %llu bytes at offset %llu: offset, size and buffer must be multiples of %llu",
                 ull(request.bytes), ull(request.offset), ull(align));
  }
  if (request.bytes == 0 || request.bytes > kMaxRequestBytes || request.offset > uint64_t{1} << 62) {
    return error(Code::kBadArgument, "read of %llu bytes at offset %llu: expected 1 to %llu bytes", ull(request.bytes),
                 ull(request.offset), ull(kMaxRequestBytes));
  }
  return {};
}

void PieceQueue::add(const ReadRequest& request) {
  uint32_t index;
  if (free_.empty()) {
    index = static_cast<uint32_t>(open_.size());
    open_.emplace_back();
  } else {
    index = free_.back();
    free_.pop_back();
    open_[index] = Open{};
  }
  open_[index].request = request;
  waiting_.push_back(index);
  ++n_open_;
}

bool PieceQueue::next(Piece* piece) {
  if (!again_.empty()) {
    *piece = again_.front();
    again_.pop_front();
    piece->read_index = n_issued_++;
    return true;
  }
  if (waiting_.empty()) return false;
  const uint32_t index = waiting_.front();
  Open& open = open_[index];
  const ReadRequest& request = open.request;
  *piece = Piece{};
  piece->offset = request.offset + open.issued_bytes;
  piece->bytes = std::min(kPieceBytes, request.bytes - open.issued_bytes);
  piece->into = request.into + open.issued_bytes;
  piece->request = index;
  piece->read_index = n_issued_++;
  open.issued_bytes += piece->bytes;
  ++open.n_pieces;
  if (open.issued_bytes == request.bytes) waiting_.pop_front();
  return true;
}

void PieceQueue::fail(Open* open, Status status) {
  if (open->status.ok()) open->status = std::move(status);
  // What is left of a failed request is not worth the drive's time.
  const auto index = static_cast<uint32_t>(open - open_.data());
  if (!waiting_.empty()) std::erase(waiting_, index);
  open->issued_bytes = open->request.bytes;
}

void PieceQueue::landed(const Piece& piece, int64_t result) {
  Open& open = open_[piece.request];
  --open.n_pieces;
  if (result > 0) bytes_landed_ += static_cast<uint64_t>(result);
  if (open.status.ok() && result != static_cast<int64_t>(piece.bytes)) {
    const bool transient = result == -EINTR || result == -EAGAIN;
    // A direct read that ends inside a block cannot go on there: only the end of the file does that.
    const auto align = static_cast<int64_t>(file_->align());
    const int64_t progress = result > 0 && file_->direct() ? result / align * align : result;
    if (transient && piece.retries < kMaxRetries) {
      again_.push_back(piece);
      ++again_.back().retries;
      ++open.n_pieces;
    } else if (result < 0) {
      fail(&open, error(Code::kDiskError, "%s: read of %llu bytes at offset %llu failed: %s", file_->path().c_str(),
                        ull(piece.bytes), ull(piece.offset), strerror(static_cast<int>(-result))));
    } else if (progress > 0 && progress < static_cast<int64_t>(piece.bytes)) {
      Piece rest = piece;
      rest.offset += static_cast<uint64_t>(progress);
      rest.bytes -= static_cast<uint64_t>(progress);
      rest.into += progress;
      rest.retries = 0;
      again_.push_back(rest);
      ++open.n_pieces;
    } else {
      fail(&open, error(Code::kDiskError, "%s: the file shrank: expected %llu bytes at offset %llu, found %llu",
                        file_->path().c_str(), ull(piece.bytes), ull(piece.offset),
                        ull(static_cast<uint64_t>(std::max<int64_t>(result, 0)))));
    }
  }
  finish_if_done(piece.request);
}

void PieceQueue::finish_if_done(uint32_t index) {
  Open& open = open_[index];
  if (open.n_pieces != 0 || open.issued_bytes != open.request.bytes) return;
  finished_.push_back({open.request.tag, std::move(open.status)});
  free_.push_back(index);
  --n_open_;
}

std::optional<ReadCompletion> PieceQueue::take() {
  if (finished_.empty()) return std::nullopt;
  ReadCompletion completion = std::move(finished_.front());
  finished_.pop_front();
  return completion;
}

}  // namespace edge
