// Rows out of weights that are not in memory: the chunks around their tiles are read for each lease, and not kept.
#include <algorithm>
#include <cstring>

#include "store/demand_cache.h"
#include "store/wait_timer.h"

namespace edge {
namespace {

// Whole chunks around the tiles that hold these rows, in file order, those that touch joined.
std::vector<ChunkSpan> row_spans(const PackEntry& entry, WeightId weight, RowSet rows) {
  const uint64_t tile_bytes = row_tile_bytes(entry);
  std::vector<ChunkSpan> spans;
  for (const int32_t row : rows) {
    const uint64_t first = static_cast<uint64_t>(row / kTileRows) * tile_bytes;
    spans.push_back({weight, first / entry.chunk_bytes * entry.chunk_bytes,
                     std::min(round_up(first + tile_bytes, entry.chunk_bytes), entry.stored_bytes)});
  }
  std::sort(spans.begin(), spans.end(), [](const ChunkSpan& a, const ChunkSpan& b) { return a.begin < b.begin; });
  size_t n = 0;
  for (const ChunkSpan& span : spans) {
    if (n > 0 && span.begin <= spans[n - 1].end) spans[n - 1].end = std::max(spans[n - 1].end, span.end);
    else spans[n++] = span;
  }
  spans.resize(n);
  return spans;
}

}  // namespace

uint64_t DemandCache::row_lease_bytes(const PackEntry& entry, size_t n_rows) {
  const uint64_t tile = row_tile_bytes(entry);
  const uint64_t read = std::min(round_up(tile, entry.chunk_bytes) + entry.chunk_bytes, entry.stored_bytes);
  return std::min(n_rows * read, entry.stored_bytes) + (n_rows > 1 ? round_up(n_rows * tile, kReadAlign) : 0);
}

Result<Lease> DemandCache::acquire_rows(WeightId weight, RowSet rows) {
  const PackEntry& entry = directory_.entry(weight);
  EDGE_TRY(check_rows(entry, rows));
  const uint64_t tile_bytes = row_tile_bytes(entry);
  std::vector<ChunkSpan> spans = row_spans(entry, weight, rows);
  uint64_t read_bytes = 0;
  for (const ChunkSpan& span : spans) read_bytes += span.end - span.begin;

  ++misses_;
  WaitTimer timer(&wait_ns_);
  // One extent: the gathered tiles, when there are several, then the chunks they are taken from.
  const uint64_t gathered_bytes = rows.size() > 1 ? round_up(rows.size() * tile_bytes, kReadAlign) : 0;
  row_bytes_ = gathered_bytes + read_bytes;
  EDGE_ASSIGN(const uint64_t extent, make_room(row_bytes_, 0, entry, Need::kDemanded));
  const uint64_t chunks = extent + gathered_bytes;
  // A node of its own: should the reader itself break down, reads still in flight keep a live target.
  const auto load = row_loads_.emplace(row_loads_.end());
  uint64_t at = chunks;
  for (const ChunkSpan& span : spans) {
    const uint64_t bytes = span.end - span.begin;
    load->waiting.push_back({entry.offset + span.begin, bytes, memory_.data() + at, {span}});
    at += bytes;
  }
  queue_.push_front(&*load);
  while (!load->landed()) EDGE_TRY(step());
  const Status status = load->failures.empty() ? load->status : load->failures.front().second;
  row_loads_.erase(load);
  if (!status.ok()) {
    pool_.give_back(extent);
    return status;
  }
  // Where a tile lies among the chunks read: spans are sorted and tiles never straddle two of them.
  const auto tile_data = [&](int32_t row) {
    const uint64_t first = static_cast<uint64_t>(row / kTileRows) * tile_bytes;
    const std::byte* data = memory_.data() + chunks;
    for (const ChunkSpan& span : spans) {
      if (first < span.end) return data + (first - span.begin);
      data += span.end - span.begin;
    }
    return data;
  };
  const std::byte* data = tile_data(rows[0]);
  if (rows.size() > 1) {
    std::byte* const into = memory_.data() + extent;
    for (size_t i = 0; i < rows.size(); ++i) std::memcpy(into + i * tile_bytes, tile_data(rows[i]), tile_bytes);
    pool_.shrink(extent, gathered_bytes);
    data = into;
  }
  return Lease(data, &entry, [this, extent] { pool_.give_back(extent); });
}

}  // namespace edge
