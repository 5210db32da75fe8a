#include <cstdlib>

#include "io/engines.h"

namespace edge {
namespace {
constexpr int kMaxDepth = 1024;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}
}  // namespace

Status BlockReader::submit_all(std::span<const ReadRequest> requests) {
  for (const ReadRequest& request : requests) EDGE_TRY(submit(request));
  return {};
}

Status BlockReader::read_all(std::span<const ReadRequest> requests) {
  Status first;
  size_t n_flying = 0;
  const auto take_one = [&]() -> Status {
    EDGE_ASSIGN(const ReadCompletion completion, wait());
    --n_flying;
    if (first.ok()) first = completion.status;
    return {};
  };
  for (const ReadRequest& request : requests) {
    while (n_flying >= static_cast<size_t>(depth())) EDGE_TRY(take_one());
    if (!first.ok()) break;
    first = submit(request);
    if (first.ok()) ++n_flying;
  }
  while (n_flying > 0) EDGE_TRY(take_one());
  return first;
}

Result<std::unique_ptr<BlockReader>> open_reader(const std::string& path, const ReaderOptions& options) {
  std::string engine = options.engine;
  if (engine == "auto" && !environment("EDGE_IO").empty()) engine = environment("EDGE_IO");
  if (engine != "auto" && engine != "io_uring" && engine != "pread") {
    return error(Code::kBadArgument, "I/O engine: expected auto, io_uring or pread, found \"%s\"", engine.c_str());
  }
  if (options.depth < 1 || options.depth > kMaxDepth) {
    return error(Code::kBadArgument, "I/O depth: expected 1 to %d, found %d", kMaxDepth, options.depth);
  }
  EDGE_ASSIGN(FaultPlan faults, FaultPlan::parse(options.fault.empty() ? environment("EDGE_IO_FAULT") : options.fault));
  if (engine == "io_uring") EDGE_TRY(uring_available());
  EDGE_ASSIGN(ReadFile file, ReadFile::open(path, options.direct, options.keep_cache));
  if (engine == "pread" || !uring_available().ok()) {
    return open_pread_reader(std::move(file), std::move(faults), options.depth);
  }
  Result<std::unique_ptr<BlockReader>> reader = open_uring_reader(std::move(file), faults, options.depth);
  if (reader.ok() || engine == "io_uring") return reader;
  // Locked memory or descriptors can run out between one ring and the next.
  EDGE_ASSIGN(ReadFile again, ReadFile::open(path, options.direct, options.keep_cache));
  return open_pread_reader(std::move(again), std::move(faults), options.depth);
}

std::vector<IoEngine> io_engines() {
  const Status uring = uring_available();
  return {{"io_uring", uring.ok(), uring.message()}, {"pread", true, ""}};
}

}  // namespace edge
