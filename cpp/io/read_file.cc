#include "io/read_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "io/block_reader.h"

namespace edge {
namespace {

constexpr uint64_t kFineAlign = 512;

// Whether [at, at + bytes) of the first page can be read by itself.
bool reads(int fd, uint64_t at, uint64_t bytes) {
  void* page = mmap(nullptr, kReadAlign, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return false;
  ssize_t got;
  do {
    got = pread(fd, static_cast<std::byte*>(page) + at, bytes, static_cast<off_t>(at));
  } while (got < 0 && errno == EINTR);
  munmap(page, kReadAlign);
  return got == static_cast<ssize_t>(bytes);
}

// The finest direct reads that work; 0 for none: some file systems accept the flag and refuse the read.
uint64_t direct_align(int fd, uint64_t file_bytes) {
  if (file_bytes < kReadAlign) return kReadAlign;
  if (!reads(fd, 0, kReadAlign)) return 0;
  return reads(fd, kFineAlign, kFineAlign) ? kFineAlign : kReadAlign;
}

}  // namespace

ReadFile& ReadFile::operator=(ReadFile&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    path_ = std::move(other.path_);
    fd_ = std::exchange(other.fd_, -1);
    direct_ = other.direct_;
    keep_cache_ = other.keep_cache_;
    align_ = other.align_;
    bytes_ = other.bytes_;
  }
  return *this;
}

ReadFile::~ReadFile() {
  if (fd_ >= 0) close(fd_);
}

Result<ReadFile> ReadFile::open(const std::string& path, bool direct, bool keep_cache) {
  // O_NONBLOCK: opening a named pipe must not wait for its writer.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  ReadFile file;
  file.path_ = path;
  file.keep_cache_ = keep_cache;
#ifdef O_DIRECT
  if (direct) {
    file.fd_ = ::open(path.c_str(), flags | O_DIRECT);
    file.direct_ = file.fd_ >= 0;
  }
#endif
  if (file.fd_ < 0) file.fd_ = ::open(path.c_str(), flags);
  if (file.fd_ < 0) {
    const bool machine = errno == EIO || errno == EMFILE || errno == ENFILE || errno == ENOMEM;
    return error(machine ? Code::kDiskError : Code::kBadFile, "%s: cannot be opened: %s", path.c_str(),
                 strerror(errno));
  }
  struct stat info;
  if (fstat(file.fd_, &info) != 0) {
    return error(Code::kDiskError, "%s: cannot be examined: %s", path.c_str(), strerror(errno));
  }
  if (!S_ISREG(info.st_mode)) return error(Code::kBadFile, "%s: expected a regular file", path.c_str());
  file.bytes_ = static_cast<uint64_t>(info.st_size);
  // Buffered reads leave whole pages behind, and only whole ones can be dropped again.
  file.align_ = file.direct_ ? direct_align(file.fd_, file.bytes_) : kReadAlign;
  if (file.align_ == 0) {
    file.align_ = kReadAlign;
    close(file.fd_);
    file.direct_ = false;
    file.fd_ = ::open(path.c_str(), flags);
    if (file.fd_ < 0) return error(Code::kDiskError, "%s: cannot be reopened: %s", path.c_str(), strerror(errno));
  }
  // Read-ahead would leave pages behind that no request asked for, and the queue is deep enough without it.
  if (!file.direct_) posix_fadvise(file.fd_, 0, 0, POSIX_FADV_RANDOM);
  return file;
}

void ReadFile::drop(uint64_t offset, uint64_t bytes) const {
  if (direct_ || keep_cache_) return;
  posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
}

uint64_t cached_pages(const std::string& path, uint64_t offset, uint64_t bytes) {
#ifdef __linux__
  constexpr long kCachestat = 451;  // the same number on every architecture; older headers lack it
  struct {
    uint64_t offset, bytes;
  } range{offset, bytes};
  struct {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;  // pages
  } found{};
  Result<ReadFile> file = ReadFile::open(path, /*direct=*/false, /*keep_cache=*/true);
  if (!file.ok() || bytes == 0) return 0;
  return syscall(kCachestat, file->fd(), &range, &found, 0) == 0 ? found.cached : 0;
#else
  (void)path, (void)offset, (void)bytes;
  return 0;
#endif
}

uint64_t pages_of(uint64_t offset, uint64_t bytes) {
  const auto page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return (round_up(offset + bytes, page_bytes) - offset / page_bytes * page_bytes) / page_bytes;
}

bool page_cached(const std::string& path, uint64_t offset, uint64_t bytes) {
  return bytes > 0 && cached_pages(path, offset, bytes) >= pages_of(offset, bytes);
}

}  // namespace edge
