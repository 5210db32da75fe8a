// One io_uring by raw system calls (io_uring(7)): no liburing, and no kernel header, which build images often lack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/status.h"

namespace edge {

struct UringCompletion {
  uint64_t user_data;
  int32_t result;  // bytes or -errno
};

class UringRing {
 public:
  // kUnsupported with the reason where the kernel or the container refuses, or has no IORING_OP_READ (Linux 5.6).
  static Result<std::unique_ptr<UringRing>> create(uint32_t entries);
  ~UringRing();
  UringRing(const UringRing&) = delete;
  UringRing& operator=(const UringRing&) = delete;

  // Queues a read for the next enter(). The caller keeps at most `entries` queued or in flight.
  void push_read(int fd, uint64_t offset, std::byte* into, uint32_t bytes, uint64_t user_data);
  // Hands queued reads to the kernel and waits for `min_complete` completions. Interrupted or short of resources counts
  // as success: completions may be fewer. kDiskError when the ring is unusable.
  Status enter(uint32_t min_complete);
  // The next completion, without a system call; false when there is none.
  bool pop(UringCompletion* completion);

 private:
  UringRing() = default;

  int fd_ = -1;
  std::byte* rings_ = nullptr;  // submission and completion ring share one mapping
  size_t rings_bytes_ = 0;
  std::byte* entries_ = nullptr;
  size_t entries_bytes_ = 0;
  uint32_t* sq_tail_ = nullptr;
  uint32_t sq_mask_ = 0;
  uint32_t* sq_array_ = nullptr;
  uint32_t* cq_head_ = nullptr;
  uint32_t* cq_tail_ = nullptr;
  uint32_t cq_mask_ = 0;
  const std::byte* cqes_ = nullptr;
  uint32_t n_queued_ = 0;   // pushed, not yet taken by the kernel
  uint32_t n_refused_ = 0;  // in a row
};

}  // namespace edge
