// Long reads over the stored bytes of neighbouring weights, cut at chunk boundaries so that each can be checked alone.
#pragma once

#include <cstdint>
#include <vector>

#include "core/status.h"
#include "format/pack_directory.h"
#include "io/block_reader.h"
#include "store/weight_store.h"

namespace edge {

// Long enough for the drive's sequential rate, short enough that checking one overlaps the reading of the next.
inline constexpr uint64_t kRunBytes = 1 << 20;

// Whole chunks of one weight: [begin, end) of its stored bytes.
struct ChunkSpan {
  WeightId weight = kNoWeight;
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct ReadRun {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  std::byte* into = nullptr;
  std::vector<ChunkSpan> spans;  // side by side in file and memory

  ReadRequest request(uint64_t tag) const { return {offset, bytes, into, tag}; }
};

// Adds the chunks of `weight` from `*begin` on, which land in `weight_memory + *begin`, and advances `*begin`.
// Takes at most `room_bytes`; a run is at most kRunBytes long, or one chunk where that is longer.
// False when the weight has chunks left: the run is full, there is no room, or they do not continue the run.
bool extend_run(ReadRun* run, const PackDirectory& directory, WeightId weight, std::byte* weight_memory,
                uint64_t* begin, uint64_t room_bytes = UINT64_MAX);

// The hash of every chunk of a run that has landed: of the whole run, or of its n-th span alone, so that damage in one
// weight is not told of its neighbours.
Status check_run(const ReadRun& run, const PackDirectory& directory);
Status check_span(const ReadRun& run, size_t n, const PackDirectory& directory);

// Readers of a store; `depth` requests in flight unless the options name another number.
ReaderOptions reader_options(const StoreOptions& options, int depth = ReaderOptions().depth);

// kBadArgument when a row lies outside the weight.
Status check_rows(const PackEntry& entry, RowSet rows);

// Bytes of the tile of 16 rows that a row lease gives per row; records of neurons count as tiles of one row.
inline uint64_t row_tile_bytes(const PackEntry& entry) {
  if (is_neuron_format(entry.format)) return entry.chunk_bytes;
  return static_cast<uint64_t>(tile_stride_bytes(entry.format, entry.cols));
}
inline int64_t tiles_of(const PackEntry& entry) {
  return is_neuron_format(entry.format) ? entry.rows : tile_count(entry.rows);
}

// The payload of one entry, checked: for blobs, and for tools.
Result<std::string> read_entry(const std::string& path, const PackDirectory& directory, WeightId weight);

}  // namespace edge
