#include "io/uring_ring.h"

#include <cerrno>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace edge {
#ifdef __linux__
namespace {

// The kernel's ABI, as io_uring_setup(2), io_uring_enter(2) and io_uring_register(2) document it. The call numbers are
// the same on every architecture but alpha.
constexpr long kSetup = 425, kEnter = 426, kRegister = 427;
// What has landed is noted down when the ring is entered, or at a tick, instead of interrupting whoever submitted it at
// once: computing goes on undisturbed (Linux 5.19).
constexpr uint32_t kSetupCooperative = 1u << 8;
constexpr uint32_t kFeatureSingleMmap = 1u << 0;
constexpr uint32_t kEnterGetEvents = 1u << 0;
constexpr uint32_t kRegisterProbe = 8;
constexpr uint8_t kOpRead = 22;
constexpr uint16_t kOpSupported = 1u << 0;
constexpr uint32_t kMaxRefused = 50'000, kRefusedPauseUs = 200;  // gives up after 10 s
constexpr off_t kOffsetRings = 0, kOffsetEntries = 0x10000000;

struct SubmissionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  uint64_t user_address;
};
struct CompletionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  uint64_t user_address;
};
struct SetupParameters {
  uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
  SubmissionOffsets sq;
  CompletionOffsets cq;
};
static_assert(sizeof(SetupParameters) == 120);

struct SubmissionEntry {
  uint8_t opcode, flags;
  uint16_t priority;
  int32_t fd;
  uint64_t offset;
  uint64_t address;
  uint32_t bytes;
  uint32_t rw_flags;
  uint64_t user_data;
  uint64_t unused[3];
};
static_assert(sizeof(SubmissionEntry) == 64);

struct CompletionEntry {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(CompletionEntry) == 16);

struct Probe {
  uint8_t last_op, n_ops;
  uint16_t reserved[7];
  struct {
    uint8_t op, reserved;
    uint16_t flags;
    uint32_t reserved2;
  } ops[64];
};

const char* why(int setup_errno) {
  switch (setup_errno) {
    case ENOSYS: return "the kernel has no io_uring (Linux 5.6 or newer needed)";
    case EPERM: return "io_uring is refused here (container profile or kernel.io_uring_disabled)";
    case ENOMEM: return "no locked memory left for the ring (RLIMIT_MEMLOCK)";
    default: return strerror(setup_errno);
  }
}

uint32_t load_acquire(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
void store_release(uint32_t* at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

}  // namespace

Result<std::unique_ptr<UringRing>> UringRing::create(uint32_t entries) {
  SetupParameters parameters{};
  parameters.flags = kSetupCooperative;
  long fd = syscall(kSetup, entries, &parameters);
  if (fd < 0 && errno == EINVAL) {
    parameters = {};
    fd = syscall(kSetup, entries, &parameters);
  }
  if (fd < 0) return error(Code::kUnsupported, "io_uring: %s", why(errno));
  std::unique_ptr<UringRing> ring(new UringRing());
  ring->fd_ = static_cast<int>(fd);
  Probe probe{};
  if ((parameters.features & kFeatureSingleMmap) == 0 || syscall(kRegister, fd, kRegisterProbe, &probe, 64) < 0 ||
      probe.n_ops <= kOpRead || (probe.ops[kOpRead].flags & kOpSupported) == 0) {
    return error(Code::kUnsupported, "io_uring: the kernel's is too old (Linux 5.6 or newer needed)");
  }
  const size_t sq_bytes = parameters.sq.array + parameters.sq_entries * sizeof(uint32_t);
  const size_t cq_bytes = parameters.cq.cqes + parameters.cq_entries * sizeof(CompletionEntry);
  ring->rings_bytes_ = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
  ring->entries_bytes_ = parameters.sq_entries * sizeof(SubmissionEntry);
  const auto map = [&](size_t bytes, off_t offset) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd_, offset);
    return at == MAP_FAILED ? nullptr : static_cast<std::byte*>(at);
  };
  ring->rings_ = map(ring->rings_bytes_, kOffsetRings);
  ring->entries_ = map(ring->entries_bytes_, kOffsetEntries);
  if (ring->rings_ == nullptr || ring->entries_ == nullptr) {
    return error(Code::kUnsupported, "io_uring: the ring cannot be mapped: %s", strerror(errno));
  }
  const auto word = [&](uint32_t offset) { return reinterpret_cast<uint32_t*>(ring->rings_ + offset); };
  ring->sq_tail_ = word(parameters.sq.tail);
  ring->sq_mask_ = *word(parameters.sq.ring_mask);
  ring->sq_array_ = word(parameters.sq.array);
  ring->cq_head_ = word(parameters.cq.head);
  ring->cq_tail_ = word(parameters.cq.tail);
  ring->cq_mask_ = *word(parameters.cq.ring_mask);
  ring->cqes_ = ring->rings_ + parameters.cq.cqes;
  return ring;
}

UringRing::~UringRing() {
  if (entries_ != nullptr) munmap(entries_, entries_bytes_);
  if (rings_ != nullptr) munmap(rings_, rings_bytes_);
  if (fd_ >= 0) close(fd_);
}

void UringRing::push_read(int fd, uint64_t offset, std::byte* into, uint32_t bytes, uint64_t user_data) {
  const uint32_t tail = *sq_tail_;  // only this side writes it
  const uint32_t slot = tail & sq_mask_;
  SubmissionEntry& entry = reinterpret_cast<SubmissionEntry*>(entries_)[slot];
  entry = SubmissionEntry{};
  entry.opcode = kOpRead;
  entry.fd = fd;
  entry.offset = offset;
  entry.address = reinterpret_cast<uint64_t>(into);
  entry.bytes = bytes;
  entry.user_data = user_data;
  sq_array_[slot] = slot;
  store_release(sq_tail_, tail + 1);
  ++n_queued_;
}

Status UringRing::enter(uint32_t min_complete) {
  const uint32_t flags = min_complete > 0 ? kEnterGetEvents : 0;
  const long taken = syscall(kEnter, fd_, n_queued_, min_complete, flags, nullptr, 0);
  if (taken >= 0) {
    n_queued_ -= static_cast<uint32_t>(taken);
    n_refused_ = 0;
    return {};
  }
  if (errno == EINTR) return {};
  if ((errno == EAGAIN || errno == EBUSY) && ++n_refused_ < kMaxRefused) {
    usleep(kRefusedPauseUs);  // the kernel is short of memory for requests, or of room for completions
    return {};
  }
  return error(Code::kDiskError, "io_uring: %s", strerror(errno));
}

bool UringRing::pop(UringCompletion* completion) {
  const uint32_t head = *cq_head_;
  if (head == load_acquire(cq_tail_)) return false;
  const auto& entry = reinterpret_cast<const CompletionEntry*>(cqes_)[head & cq_mask_];
  *completion = {entry.user_data, entry.result};
  store_release(cq_head_, head + 1);
  return true;
}

#else

Result<std::unique_ptr<UringRing>> UringRing::create(uint32_t) {
  return error(Code::kUnsupported, "io_uring: only Linux has it");
}
UringRing::~UringRing() = default;
void UringRing::push_read(int, uint64_t, std::byte*, uint32_t, uint64_t) {}
Status UringRing::enter(uint32_t) { return error(Code::kUnsupported, "io_uring: only Linux has it"); }
bool UringRing::pop(UringCompletion*) { return false; }

#endif
}  // namespace edge
