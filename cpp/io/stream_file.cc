#include "io/stream_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace edge {
namespace {
constexpr uint64_t kDropBytes = 8 << 20;  // left in the page cache at most
constexpr int kMaxRetries = 100;          // in a row, of EINTR or EAGAIN

unsigned long long ull(uint64_t value) { return value; }

Result<FaultPlan> faults_of(const char* variable) {
  const char* value = std::getenv(variable);
  return FaultPlan::parse(value == nullptr ? "" : value);
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

Status sync_folder(const std::string& path) {
  const std::string folder = folder_of(path);
  const int fd = open(folder.c_str(), O_RDONLY | O_CLOEXEC);
  // Some file systems do not sync folders; the file itself is safe.
  const bool ok = fd < 0 || fsync(fd) == 0 || errno == EINVAL || errno == EBADF;
  const int code = errno;
  if (fd >= 0) close(fd);
  return ok ? Status() : error(Code::kDiskError, "%s: cannot be synced: %s", folder.c_str(), strerror(code));
}
}  // namespace

Result<std::unique_ptr<StreamWriter>> StreamWriter::create(const std::string& path) {
  std::unique_ptr<StreamWriter> writer(new StreamWriter());
  EDGE_ASSIGN(writer->faults_, faults_of("EDGE_IO_WRITE_FAULT"));
  writer->path_ = path;
  writer->temporary_ = path + ".XXXXXX";
  writer->fd_ = mkostemp(writer->temporary_.data(), O_CLOEXEC);
  if (writer->fd_ < 0) return writer->failed("cannot be created");
  return writer;
}

StreamWriter::~StreamWriter() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_.c_str());
}

Status StreamWriter::failed(const char* what) const {
  return error(Code::kDiskError, "%s: %s: %s", path_.c_str(), what, strerror(errno));
}

void StreamWriter::drop() {
  fdatasync(fd_);  // dirty pages cannot be dropped; what fails here fails again in finish()
  posix_fadvise(fd_, static_cast<off_t>(dropped_), static_cast<off_t>(at_ - dropped_), POSIX_FADV_DONTNEED);
  dropped_ = at_;
}

Status StreamWriter::write(std::span<const std::byte> data) {
  int retries = 0;
  while (!data.empty()) {
    const ssize_t put = pwrite(fd_, data.data(), data.size(), static_cast<off_t>(at_));
    const int64_t result = faults_.apply(n_writes_++, put < 0 ? -errno : put, nullptr);
    if ((result == -EINTR || result == -EAGAIN) && ++retries <= kMaxRetries) continue;
    if (result <= 0) {
      return error(Code::kDiskError, "%s: write of %zu bytes at offset %llu failed: %s", path_.c_str(), data.size(),
                   ull(at_), result < 0 ? strerror(static_cast<int>(-result)) : "nothing was written");
    }
    retries = 0;
    at_ += static_cast<uint64_t>(result);
    data = data.subspan(static_cast<size_t>(result));
  }
  if (at_ - dropped_ >= kDropBytes) drop();
  return {};
}

Status StreamWriter::finish() {
  if (fsync(fd_) != 0) return failed("cannot be synced");
  drop();
  if (rename(temporary_.c_str(), path_.c_str()) != 0) return failed("cannot be renamed into place");
  close(fd_);
  fd_ = -1;
  return sync_folder(path_);
}

Result<std::unique_ptr<StreamReader>> StreamReader::open(const std::string& path) {
  std::unique_ptr<StreamReader> reader(new StreamReader());
  EDGE_ASSIGN(reader->faults_, faults_of("EDGE_IO_FAULT"));
  reader->path_ = path;
  // O_NONBLOCK: opening a named pipe must not wait for its writer.
  reader->fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat info;
  if (reader->fd_ < 0 || fstat(reader->fd_, &info) != 0) {
    return error(Code::kBadFile, "%s: cannot be opened: %s", path.c_str(), strerror(errno));
  }
  if (!S_ISREG(info.st_mode)) return error(Code::kBadFile, "%s: expected a regular file", path.c_str());
  reader->bytes_ = static_cast<uint64_t>(info.st_size);
  posix_fadvise(reader->fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
  return reader;
}

StreamReader::~StreamReader() {
  if (fd_ < 0) return;
  drop();
  close(fd_);
}

void StreamReader::drop() {
  posix_fadvise(fd_, static_cast<off_t>(dropped_), static_cast<off_t>(at_ - dropped_), POSIX_FADV_DONTNEED);
  dropped_ = at_;
}

Status StreamReader::read(std::span<std::byte> into) {
  int retries = 0;
  while (!into.empty()) {
    const ssize_t got = pread(fd_, into.data(), into.size(), static_cast<off_t>(at_));
    const int64_t result = faults_.apply(n_reads_++, got < 0 ? -errno : got, into.data());
    if ((result == -EINTR || result == -EAGAIN) && ++retries <= kMaxRetries) continue;
    if (result < 0) {
      return error(Code::kDiskError, "%s: read of %zu bytes at offset %llu failed: %s", path_.c_str(), into.size(),
                   ull(at_), strerror(static_cast<int>(-result)));
    }
    if (result == 0) {
      return error(Code::kBadFile, "%s: ends at byte %llu: expected %zu more", path_.c_str(), ull(at_), into.size());
    }
    retries = 0;
    at_ += static_cast<uint64_t>(result);
    into = into.subspan(static_cast<size_t>(result));
  }
  if (at_ - dropped_ >= kDropBytes) drop();
  return {};
}

}  // namespace edge
