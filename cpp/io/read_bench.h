// How fast the drive answers: the measurement behind `edge probe` and bench/flash.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "io/block_reader.h"

namespace edge {

struct ReadBenchOptions {
  ReaderOptions reader;
  uint64_t bytes_per_request = 1 << 20;  // multiple of 4096
  bool sequential = false;               // else at random offsets
  double seconds = 1;
};

struct ReadBenchResult {
  const char* engine = "";
  bool direct = false;
  uint64_t align = 0;  // the finest read
  uint64_t n_requests = 0;
  uint64_t bytes = 0;
  double seconds = 0;
  double mean_latency_us = 0;
  double p99_latency_us = 0;
  double cpu_seconds = 0;  // of the whole process
};

// Keeps `depth` requests in flight until the time is over. Buffers come from their own budget of depth x bytes.
Result<ReadBenchResult> bench_read(const std::string& path, const ReadBenchOptions& options);

struct ReadPiece {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

// Reads given pieces, all of a group before the next group begins, as the layers of a pass ask for them. Pieces of group i
// are those from group_ends[i - 1] to group_ends[i]; offsets and bytes are multiples of the file's finest read. Latencies
// are left out.
Result<ReadBenchResult> replay_reads(const std::string& path, const ReaderOptions& options,
                                     std::span<const ReadPiece> pieces, std::span<const uint64_t> group_ends);

}  // namespace edge
