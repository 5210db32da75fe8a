#include "io/read_bench.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <vector>

#include "core/budget.h"

namespace edge {
namespace {

double cpu_now() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// SplitMix64: the offsets of a run are the same on every machine.
uint64_t next_random(uint64_t* state) {
  uint64_t z = (*state += 0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

constexpr size_t kMaxLatencies = 1 << 20;
constexpr uint64_t kMostPieceBytes = 16 << 20;

}  // namespace

Result<ReadBenchResult> bench_read(const std::string& path, const ReadBenchOptions& options) {
  using Clock = std::chrono::steady_clock;
  const uint64_t bytes = options.bytes_per_request;
  if (bytes == 0 || bytes % kReadAlign != 0 || bytes > uint64_t{1} << 30 || options.reader.depth < 1 ||
      options.reader.depth > 1024 || !(options.seconds > 0 && options.seconds <= 600)) {
    return error(Code::kBadArgument,
                 "read bench: expected requests of a multiple of 4096 bytes, depth 1 to 1024, up to 600 s");
  }
  const auto depth = static_cast<size_t>(options.reader.depth);
  Budget budget(bytes * depth);
  EDGE_ASSIGN(const Block buffers, budget.reserve(bytes * depth, "io"));
  EDGE_ASSIGN(const std::unique_ptr<BlockReader> reader, open_reader(path, options.reader));
  const uint64_t n_places = reader->file_bytes() < bytes ? 0
                            : options.sequential         ? reader->file_bytes() / bytes
                                                         : (reader->file_bytes() - bytes) / kReadAlign + 1;
  if (n_places == 0) {
    return error(Code::kBadArgument, "%s: expected a file of at least %llu bytes", path.c_str(),
                 static_cast<unsigned long long>(bytes));
  }
  ReadBenchResult result;
  result.engine = reader->engine();
  result.direct = reader->direct();
  result.align = reader->align();
  std::vector<Clock::time_point> sent(depth);
  std::vector<float> latencies_us;
  uint64_t random = 1, place = 0, n_sent = 0;
  const double cpu_start = cpu_now();
  const Clock::time_point start = Clock::now();
  const auto since = [](Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); };
  const auto send = [&](uint64_t slot) {
    const uint64_t offset =
        options.sequential ? place++ % n_places * bytes : next_random(&random) % n_places * kReadAlign;
    sent[slot] = Clock::now();
    ++n_sent;
    return reader->submit({offset, bytes, buffers.data() + slot * bytes, slot});
  };
  for (uint64_t slot = 0; slot < depth; ++slot) EDGE_TRY(send(slot));
  double latency_sum_us = 0;
  while (result.n_requests < n_sent) {
    EDGE_ASSIGN(const ReadCompletion completion, reader->wait());
    EDGE_TRY(completion.status);
    const double latency_us = 1e6 * since(sent[completion.tag]);
    latency_sum_us += latency_us;
    if (latencies_us.size() < kMaxLatencies) latencies_us.push_back(static_cast<float>(latency_us));
    ++result.n_requests;
    if (since(start) < options.seconds) EDGE_TRY(send(completion.tag));
  }
  result.seconds = since(start);
  result.cpu_seconds = cpu_now() - cpu_start;
  result.bytes = result.n_requests * bytes;
  result.mean_latency_us = latency_sum_us / static_cast<double>(result.n_requests);
  const auto p99 = latencies_us.begin() + static_cast<ptrdiff_t>(latencies_us.size() * 99 / 100);
  std::nth_element(latencies_us.begin(), p99, latencies_us.end());
  result.p99_latency_us = *p99;
  return result;
}

Result<ReadBenchResult> replay_reads(const std::string& path, const ReaderOptions& options,
                                     std::span<const ReadPiece> pieces, std::span<const uint64_t> group_ends) {
  using Clock = std::chrono::steady_clock;
  uint64_t largest = 0;
  for (const ReadPiece& piece : pieces) largest = std::max(largest, piece.bytes);
  if (!std::is_sorted(group_ends.begin(), group_ends.end()) || group_ends.empty() || group_ends.back() != pieces.size() ||
      largest == 0 || largest > kMostPieceBytes || options.depth < 1 || options.depth > 1024) {
    return error(Code::kBadArgument, "read replay: expected ascending groups that end with the last of 1 or more pieces, "
                                     "pieces of up to 16 MiB, depth 1 to 1024");
  }
  const uint64_t slot_bytes = round_up(largest, kReadAlign);
  const auto depth = static_cast<uint64_t>(options.depth);
  Budget budget(slot_bytes * depth);
  EDGE_ASSIGN(const Block buffers, budget.reserve(slot_bytes * depth, "io"));
  EDGE_ASSIGN(const std::unique_ptr<BlockReader> reader, open_reader(path, options));
  ReadBenchResult result;
  result.engine = reader->engine();
  result.direct = reader->direct();
  result.align = reader->align();
  const double cpu_start = cpu_now();
  const Clock::time_point start = Clock::now();
  uint64_t sent = 0;
  const auto send = [&](uint64_t slot) {
    const ReadPiece& piece = pieces[sent++];
    result.bytes += piece.bytes;
    return reader->submit({piece.offset, piece.bytes, buffers.data() + slot * slot_bytes, slot});
  };
  for (const uint64_t end : group_ends) {
    for (uint64_t slot = 0; slot < depth && sent < end; ++slot) EDGE_TRY(send(slot));
    while (result.n_requests < end) {
      EDGE_ASSIGN(const ReadCompletion completion, reader->wait());
      EDGE_TRY(completion.status);
      ++result.n_requests;
      if (sent < end) EDGE_TRY(send(completion.tag));
    }
  }
  result.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  result.cpu_seconds = cpu_now() - cpu_start;
  return result;
}

}  // namespace edge
