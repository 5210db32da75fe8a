#include "io/scratch_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace edge {
namespace {
constexpr size_t kMaxPieces = 64;  // of one system call; systems allow at least 1024
constexpr int kMaxRetries = 100;   // in a row, of EINTR or EAGAIN

unsigned long long ull(uint64_t value) { return value; }

// Whether the file takes direct writes: some file systems accept the flag and refuse the write.
bool direct_write_works(int fd) {
  void* page = mmap(nullptr, kReadAlign, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return false;
  const bool works = pwrite(fd, page, kReadAlign, 0) == static_cast<ssize_t>(kReadAlign);
  munmap(page, kReadAlign);
  return works;
}

// Written pages must not stay in the page cache, which counts as the user's memory.
void drop_written(int fd, uint64_t offset, uint64_t bytes) {
#ifdef __linux__
  sync_file_range(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                  SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
#else
  fsync(fd);
#endif
  posix_fadvise(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
}
}  // namespace

ScratchFile::~ScratchFile() {
  reader_.reset();
  if (fd_ >= 0) close(fd_);
}

Result<std::unique_ptr<ScratchFile>> ScratchFile::create(const ScratchOptions& options, uint64_t bytes) {
  std::unique_ptr<ScratchFile> file(new ScratchFile());
  const char* environment = std::getenv("EDGE_IO_WRITE_FAULT");
  const std::string fault = options.write_fault.empty() && environment != nullptr ? environment : options.write_fault;
  EDGE_ASSIGN(file->faults_, FaultPlan::parse(fault));
  EDGE_TRY(file->open(options, bytes));
  return file;
}

Status ScratchFile::open(const ScratchOptions& options, uint64_t bytes) {
  where_ = "scratch file in " + options.folder;
  std::string path = options.folder + "/.edge-scratch-XXXXXX";
  fd_ = mkostemp(path.data(), O_CLOEXEC);
  if (fd_ < 0) return error(Code::kDiskError, "%s: cannot be created: %s", where_.c_str(), strerror(errno));
  Status status;
  if (ftruncate(fd_, static_cast<off_t>(round_up(bytes, kReadAlign))) != 0) {
    status = error(Code::kDiskError, "%s: %llu bytes are refused: %s", where_.c_str(), ull(bytes), strerror(errno));
  }
#ifdef O_DIRECT
  if (status.ok() && options.reader.direct) {
    const int flags = fcntl(fd_, F_GETFL);
    direct_ = fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0 && direct_write_works(fd_);
    if (!direct_) fcntl(fd_, F_SETFL, flags);
  }
#endif
  if (status.ok()) {
    // The reader opens the file by its name, which it loses right after.
    Result<std::unique_ptr<BlockReader>> reader = open_reader(path, options.reader);
    if (reader.ok()) reader_ = reader.take();
    else status = reader.status();
  }
  unlink(path.c_str());
  return status;
}

Status ScratchFile::write(uint64_t offset, std::span<const std::span<const std::byte>> pieces) {
  int retries = 0;
  size_t n_done = 0;    // whole pieces
  uint64_t within = 0;  // bytes of the next one
  while (n_done < pieces.size()) {
    iovec vectors[kMaxPieces];
    size_t n = 0;
    uint64_t bytes = 0;
    for (size_t i = n_done; i < pieces.size() && n < kMaxPieces; ++i, ++n) {
      const uint64_t skip = i == n_done ? within : 0;
      vectors[n] = {const_cast<std::byte*>(pieces[i].data()) + skip, pieces[i].size() - skip};
      bytes += vectors[n].iov_len;
    }
    const ssize_t put = pwritev(fd_, vectors, static_cast<int>(n), static_cast<off_t>(offset));
    const int64_t result = faults_.apply(n_writes_++, put < 0 ? -errno : put, nullptr);
    const bool transient = result == -EINTR || result == -EAGAIN;
    if (transient && ++retries <= kMaxRetries) continue;
    // A direct write goes on at a block's beginning.
    const uint64_t progress = result <= 0 ? 0 : static_cast<uint64_t>(result) / kReadAlign * kReadAlign;
    if (progress == 0) {
      return error(Code::kDiskError, "%s: write of %llu bytes at offset %llu failed: %s", where_.c_str(), ull(bytes),
                   ull(offset), result < 0 ? strerror(static_cast<int>(-result)) : "nothing was written");
    }
    retries = 0;
    if (!direct_) drop_written(fd_, offset, progress);
    offset += progress;
    bytes_written_.fetch_add(progress, std::memory_order_relaxed);
    within += progress;
    while (n_done < pieces.size() && within >= pieces[n_done].size()) within -= pieces[n_done++].size();
  }
  return {};
}

}  // namespace edge
