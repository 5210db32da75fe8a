#include "store/stream_part.h"

#include <algorithm>

namespace edge {

std::vector<StreamPart> stream_parts(const PackDirectory& directory, WeightId weight, uint64_t part_bytes) {
  const PackEntry& entry = directory.entry(weight);
  const uint64_t stored = entry.stored_bytes;
  const bool has_tiles = is_tile_format(entry.format) || is_neuron_format(entry.format);
  if (entry.layer < 0 || !has_tiles || stored <= part_bytes) return {{weight, 0, stored, 0, tiles_of(entry), 0}};
  // At least two tiles, so that every part completes one.
  const uint64_t tile_bytes = row_tile_bytes(entry);
  const uint64_t most = round_up(std::max(part_bytes, 2 * tile_bytes), entry.read_unit_bytes());
  const uint64_t n_parts = (stored + most - 1) / most;
  const uint64_t each = round_up((stored + n_parts - 1) / n_parts, entry.read_unit_bytes());
  std::vector<StreamPart> parts;
  for (uint64_t begin = 0; begin < stored; begin += each) {
    const uint64_t end = std::min(stored, begin + each);
    const uint64_t first = begin / tile_bytes;
    const bool last = end == stored;
    parts.push_back({weight, begin, end, static_cast<int64_t>(first),
                     last ? tiles_of(entry) : static_cast<int64_t>(end / tile_bytes), begin - first * tile_bytes});
  }
  return parts;
}

}  // namespace edge
