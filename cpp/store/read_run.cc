#include "store/read_run.h"

#include <algorithm>

#include "core/budget.h"

namespace edge {

bool extend_run(ReadRun* run, const PackDirectory& directory, WeightId weight, std::byte* weight_memory,
                uint64_t* begin, uint64_t room_bytes) {
  const PackEntry& entry = directory.entry(weight);
  const uint64_t left = entry.stored_bytes - *begin;
  if (left == 0) return true;
  if (run->bytes >= kRunBytes) return false;
  const uint64_t offset = entry.offset + *begin;
  std::byte* const into = weight_memory + *begin;
  if (run->bytes > 0 && (run->offset + run->bytes != offset || run->into + run->bytes != into)) return false;
  const uint64_t unit = entry.read_unit_bytes();
  uint64_t most = std::min(room_bytes, run->bytes == 0 ? std::max(kRunBytes, unit) : kRunBytes - run->bytes);
  if (most < left) most = most / unit * unit;
  const uint64_t take = std::min(left, most);
  if (take == 0) return false;
  if (run->bytes == 0) {
    run->offset = offset;
    run->into = into;
  }
  run->bytes += take;
  run->spans.push_back({weight, *begin, *begin + take});
  *begin += take;
  return *begin == entry.stored_bytes;
}

Status check_span(const ReadRun& run, size_t n, const PackDirectory& directory) {
  const ChunkSpan& span = run.spans[n];
  const PackEntry& entry = directory.entry(span.weight);
  return directory.check(entry, span.begin,
                         {run.into + (entry.offset + span.begin - run.offset), span.end - span.begin});
}

Status check_run(const ReadRun& run, const PackDirectory& directory) {
  for (size_t n = 0; n < run.spans.size(); ++n) EDGE_TRY(check_span(run, n, directory));
  return {};
}

ReaderOptions reader_options(const StoreOptions& options, int depth) {
  ReaderOptions reader;
  reader.engine = options.io_engine;
  reader.depth = options.io_depth != 0 ? options.io_depth : depth;
  reader.direct = options.io_direct;
  reader.fault = options.io_fault;
  return reader;
}

Status check_rows(const PackEntry& entry, RowSet rows) {
  for (const int32_t row : rows) {
    if (row < 0 || row >= entry.rows) {
      return error(Code::kBadArgument, "%s: expected a row from 0 to %lld, found %d", entry.name.c_str(),
                   static_cast<long long>(entry.rows) - 1, row);
    }
  }
  return {};
}

Result<std::string> read_entry(const std::string& path, const PackDirectory& directory, WeightId weight) {
  const PackEntry& entry = directory.entry(weight);
  Budget budget(UINT64_MAX >> 1);
  EDGE_ASSIGN(const Block block, budget.reserve(entry.stored_bytes, "io"));
  EDGE_ASSIGN(const std::unique_ptr<BlockReader> reader, open_reader(path, {}));
  uint64_t begin = 0;
  while (begin < entry.stored_bytes) {
    ReadRun run;
    extend_run(&run, directory, weight, block.data(), &begin);
    const ReadRequest request = run.request(0);
    EDGE_TRY(reader->read_all({&request, 1}));
    EDGE_TRY(check_run(run, directory));
  }
  return std::string(block.as<char>(), entry.bytes);
}

}  // namespace edge
