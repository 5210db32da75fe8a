#include "core/budget.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace edge {
namespace {
constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kHugePageBytes = 2 << 20;
constexpr uint64_t kMostBytes = uint64_t{1} << 50;

uint64_t whole_pages(uint64_t bytes) {
  return std::max(kPageBytes, (bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
}

unsigned long long ull(uint64_t value) { return value; }
}  // namespace

Block& Block::operator=(Block&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    budget_ = std::exchange(other.budget_, nullptr);
    tag_ = std::move(other.tag_);
  }
  return *this;
}

void Block::release() {
  if (data_ == nullptr) return;
  munmap(data_, bytes_);
  budget_->give_back(tag_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

void Block::populate() {
#ifdef MADV_POPULATE_WRITE
  if (data_ != nullptr) (void)madvise(data_, bytes_, MADV_POPULATE_WRITE);
#endif
}

Result<Block> Budget::reserve(uint64_t bytes, const char* tag) {
  const uint64_t rounded = whole_pages(std::min(bytes, kMostBytes + 1));
  std::lock_guard lock(mutex_);
  EDGE_TRY(check_room(rounded, tag));
  void* data = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return error(Code::kOverBudget, "%s: the system refused %llu bytes: %s", tag, ull(rounded), strerror(errno));
  }
  // A huge page that straddles the end would be charged in full, so only the aligned middle is advised by the kernel.
  if (rounded >= kHugePageBytes) madvise(data, rounded, MADV_HUGEPAGE);
  charge(rounded, tag);
  Block block;
  block.data_ = static_cast<std::byte*>(data);
  block.bytes_ = rounded;
  block.budget_ = this;
  block.tag_ = tag;
  return block;
}

Status Budget::check_room(uint64_t bytes, const char* tag) const {
  if (bytes > kMostBytes) return error(Code::kOverBudget, "%s: %llu bytes cannot be a real request", tag, ull(bytes));
  if (used_bytes_ <= limit_bytes_ && bytes <= limit_bytes_ - used_bytes_) return {};
  return error(Code::kOverBudget, "%s: needs %llu bytes, but %llu of the %llu-byte budget are in use", tag, ull(bytes),
               ull(used_bytes_), ull(limit_bytes_));
}

void Budget::charge(uint64_t bytes, const std::string& tag) {
  used_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  by_tag_[tag] += bytes;
}

Status Budget::resize(Block* block, uint64_t bytes) {
  const uint64_t rounded = whole_pages(std::min(bytes, kMostBytes + 1)), before = block->bytes_;
  if (rounded == before) return {};
  if (rounded < before) {
    munmap(block->data_ + rounded, before - rounded);
    block->bytes_ = rounded;
    give_back(block->tag_, before - rounded);
    return {};
  }
#ifdef __linux__
  std::lock_guard lock(mutex_);
  EDGE_TRY(check_room(rounded - before, block->tag_.c_str()));
  void* data = mremap(block->data_, before, rounded, MREMAP_MAYMOVE);
  if (data == MAP_FAILED) {
    return error(Code::kOverBudget, "%s: the system refused %llu bytes: %s", block->tag_.c_str(), ull(rounded),
                 strerror(errno));
  }
  if (rounded >= kHugePageBytes) madvise(data, rounded, MADV_HUGEPAGE);
  block->data_ = static_cast<std::byte*>(data);
  block->bytes_ = rounded;
  charge(rounded - before, block->tag_);
#else
  EDGE_ASSIGN(Block longer, reserve(rounded, block->tag_.c_str()));
  std::memcpy(longer.data_, block->data_, before);
  *block = std::move(longer);
#endif
  return {};
}

uint64_t Budget::limit_bytes() const {
  std::lock_guard lock(mutex_);
  return limit_bytes_;
}

void Budget::set_limit(uint64_t limit_bytes) {
  std::lock_guard lock(mutex_);
  limit_bytes_ = limit_bytes;
}

uint64_t Budget::used_bytes() const {
  std::lock_guard lock(mutex_);
  return used_bytes_;
}

uint64_t Budget::peak_bytes() const {
  std::lock_guard lock(mutex_);
  return peak_bytes_;
}

std::map<std::string, uint64_t> Budget::report() const {
  std::lock_guard lock(mutex_);
  return by_tag_;
}

void Budget::give_back(const std::string& tag, uint64_t bytes) {
  std::lock_guard lock(mutex_);
  used_bytes_ -= bytes;
  by_tag_[tag] -= bytes;
  if (by_tag_[tag] == 0) by_tag_.erase(tag);
}

}  // namespace edge
