// Files written, or read, from front to back through the page cache, which keeps nothing of them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "core/status.h"
#include "io/fault_plan.h"

namespace edge {

// A file that appears whole under its name, or not at all: temporary, synced, renamed.
class StreamWriter {
 public:
  // Faults come from EDGE_IO_WRITE_FAULT. kDiskError when the folder takes no file.
  static Result<std::unique_ptr<StreamWriter>> create(const std::string& path);
  // Without finish() nothing is left behind.
  ~StreamWriter();
  StreamWriter(const StreamWriter&) = delete;
  StreamWriter& operator=(const StreamWriter&) = delete;

  Status write(std::span<const std::byte> data);
  Status finish();

 private:
  StreamWriter() = default;
  Status failed(const char* what) const;
  void drop();

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  FaultPlan faults_;
  uint64_t n_writes_ = 0;
  uint64_t at_ = 0;
  uint64_t dropped_ = 0;
};

class StreamReader {
 public:
  // Faults come from EDGE_IO_FAULT. kBadFile when there is no such regular file.
  static Result<std::unique_ptr<StreamReader>> open(const std::string& path);
  ~StreamReader();
  StreamReader(const StreamReader&) = delete;
  StreamReader& operator=(const StreamReader&) = delete;

  // All of `into`, or kBadFile where the file ends before, or kDiskError.
  Status read(std::span<std::byte> into);
  uint64_t bytes() const { return bytes_; }

 private:
  StreamReader() = default;
  void drop();

  std::string path_;
  int fd_ = -1;
  uint64_t bytes_ = 0;
  FaultPlan faults_;
  uint64_t n_reads_ = 0;
  uint64_t at_ = 0;
  uint64_t dropped_ = 0;
};

}  // namespace edge
