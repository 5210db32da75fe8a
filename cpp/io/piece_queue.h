// Requests cut into pieces of at most 1 MiB, and what a piece's result means: all here, read the rest, try again, or
// failed. Both engines share it, so they share one contract. Not locked.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "io/block_reader.h"
#include "io/read_file.h"

namespace edge {

// Larger reads gain nothing on flash, and a long request cut up keeps the queue deep.
inline constexpr uint64_t kPieceBytes = 1 << 20;

struct Piece {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  std::byte* into = nullptr;
  uint64_t read_index = 0;  // counts every issue, repeats included
  uint32_t request = 0;
  uint32_t retries = 0;
};

class PieceQueue {
 public:
  explicit PieceQueue(const ReadFile* file) : file_(file) {}

  Status check(const ReadRequest& request) const;
  void add(const ReadRequest& request);
  // The next piece to issue; false when none waits.
  bool next(Piece* piece);
  // `result`: bytes read, or -errno.
  void landed(const Piece& piece, int64_t result);
  // One finished request; none when there is none.
  std::optional<ReadCompletion> take();

  size_t n_open() const { return n_open_; }  // requests added and not finished
  bool has_finished() const { return !finished_.empty(); }
  uint64_t bytes_landed() const { return bytes_landed_; }

 private:
  struct Open {
    ReadRequest request;
    uint64_t issued_bytes = 0;
    uint32_t n_pieces = 0;  // issued or waiting for another try
    Status status;
  };
  void fail(Open* open, Status status);
  void finish_if_done(uint32_t index);

  const ReadFile* file_;
  std::vector<Open> open_;
  std::vector<uint32_t> free_;
  std::deque<uint32_t> waiting_;  // requests with bytes not yet issued, oldest first
  std::deque<Piece> again_;
  std::deque<ReadCompletion> finished_;
  size_t n_open_ = 0;
  uint64_t n_issued_ = 0;
  uint64_t bytes_landed_ = 0;
};

}  // namespace edge
