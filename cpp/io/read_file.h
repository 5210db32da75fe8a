// The file behind a reader: opened read-only, regular, with O_DIRECT where the file system takes it.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"

namespace edge {

class ReadFile {
 public:
  // kBadFile when there is no such regular file; kDiskError when the system cannot open it.
  // With keep_cache the page cache is left as the reads leave it.
  static Result<ReadFile> open(const std::string& path, bool direct, bool keep_cache);

  ReadFile(ReadFile&& other) noexcept { *this = std::move(other); }
  ReadFile& operator=(ReadFile&& other) noexcept;
  ReadFile(const ReadFile&) = delete;
  ReadFile& operator=(const ReadFile&) = delete;
  ~ReadFile();

  int fd() const { return fd_; }
  bool direct() const { return direct_; }
  // What a read's place, size and buffer are multiples of: the drive's block where direct reads of one work, else a
  // page.
  uint64_t align() const { return align_; }
  bool keep_cache() const { return keep_cache_; }
  uint64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

  // Takes what a buffered read left out of the page cache again.
  void drop(uint64_t offset, uint64_t bytes) const;

 private:
  ReadFile() = default;

  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
  bool keep_cache_ = false;
  uint64_t align_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace edge
