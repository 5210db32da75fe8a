// What a streamed weight is cut into: whole chunks, because those are what hashes cover. Tiles are not aligned to them, so
// a part may begin with the end of a tile; the beginning is copied in front of it. Of rows of neurons parts hold whole
// ones, for each has a hash of its own.
#pragma once

#include <vector>

#include "store/read_run.h"

namespace edge {

struct StreamPart {
  WeightId weight = kNoWeight;
  uint64_t begin = 0, end = 0;             // stored bytes
  int64_t first_tile = 0, end_tile = 0;    // complete once this part is there
  uint64_t fragment_bytes = 0;             // of first_tile, that lie in the part before

  // Room for the fragment, which keeps the part where reads may land.
  uint64_t lead_bytes() const { return round_up(fragment_bytes, kReadAlign); }
  uint64_t room_bytes() const { return lead_bytes() + end - begin; }
};

// Matrices of layers come apart; what else streams (a head) is leased whole.
std::vector<StreamPart> stream_parts(const PackDirectory& directory, WeightId weight, uint64_t part_bytes);

}  // namespace edge
