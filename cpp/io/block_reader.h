// Reads of aligned pieces of one file, many in flight. No mmap: a mapped page counts against the user, and a
// truncated file would kill the process.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"

namespace edge {

inline constexpr uint64_t kReadAlign = 4096;

inline constexpr uint64_t round_up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// offset, bytes and into are multiples of the reader's align(), which divides 4096. bytes is at most 1 GiB.
struct ReadRequest {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  std::byte* into = nullptr;
  uint64_t tag = 0;  // the caller's; handed back with the completion
};

struct ReadCompletion {
  uint64_t tag = 0;
  Status status;  // kDiskError names path, offset, expected and found bytes or the errno text
};

class BlockReader {
 public:
  // Returns only when nothing is in flight any more, so buffers must outlive the reader.
  virtual ~BlockReader() = default;

  // Queues one read; blocks only while `depth()` reads are in flight. One thread uses a reader at a time.
  virtual Status submit(const ReadRequest& request) = 0;
  // Queues several, in one system call where the engine can; no more than depth() lacks.
  virtual Status submit_all(std::span<const ReadRequest> requests);
  // Waits for one queued read; completions come in any order. kBadArgument when none is in flight.
  virtual Result<ReadCompletion> wait() = 0;
  // The same of a read that is here already; none when all are still on their way. Never blocks.
  virtual Result<std::optional<ReadCompletion>> poll() = 0;

  virtual const char* engine() const = 0;  // "io_uring" or "pread"
  virtual bool direct() const = 0;         // O_DIRECT
  virtual int depth() const = 0;
  // 512 or 4096: what places, sizes and buffers of reads are multiples of.
  virtual uint64_t align() const = 0;
  virtual uint64_t file_bytes() const = 0;

  // From any thread.
  uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }

  // Submits all and waits for all; returns the first error after everything in flight has landed.
  // Nothing else may be in flight.
  Status read_all(std::span<const ReadRequest> requests);

 protected:
  std::atomic<uint64_t> bytes_read_{0};  // a figure: nothing is ordered by it
};

struct ReaderOptions {
  std::string engine = "auto";  // auto | io_uring | pread  (EDGE_IO overrides auto)
  bool direct = true;           // falls back to buffered + POSIX_FADV_DONTNEED where O_DIRECT is refused
  int depth = 32;               // 1..1024
  // Buffered reads of pages that others have cached already: nothing is dropped behind them.
  bool keep_cache = false;
  std::string fault;  // a FaultPlan (io/fault_plan.h); empty = EDGE_IO_FAULT, else none
};

Result<std::unique_ptr<BlockReader>> open_reader(const std::string& path, const ReaderOptions& options);

struct IoEngine {
  const char* name;
  bool available;
  std::string reason;  // why it is not; empty when it is
};

// Every engine in the order "auto" tries them, for `edge doctor`.
std::vector<IoEngine> io_engines();

// How many pages of [offset, offset + bytes) are in the page cache; 0 where the kernel cannot tell (cachestat(2), Linux 6.5).
uint64_t cached_pages(const std::string& path, uint64_t offset, uint64_t bytes);
// Pages that [offset, offset + bytes) touches.
uint64_t pages_of(uint64_t offset, uint64_t bytes);
// Whether the page cache has all of them; false where the kernel cannot tell.
bool page_cached(const std::string& path, uint64_t offset, uint64_t bytes);

}  // namespace edge
