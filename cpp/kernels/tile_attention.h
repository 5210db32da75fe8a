// Attention over tiles of 8 or 4 bit keys and values (kernels/kv_tile.h), for the query heads that share a KV head.
// Definition: ops_tiles.h. Keys are taken in segments of kKvSegment positions, each with a softmax of its own; what segments give
// is put together in their order. The bounds of segments are positions, so nothing depends on who computed which.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kv_tile.h"

namespace edge {

struct AttentionArgs;

// As many weights of 15 bits times values of 7 as an int32 takes.
inline constexpr int64_t kKvSegment = 512;

struct TileArgs {
  const int8_t* q = nullptr;  // [group][padded], kv_round_query
  const float* q_scales = nullptr;  // times the attention scale
  const int32_t* q_sums = nullptr;
  int64_t group = 0;
  KvTileLayout layout;
  const std::byte* const* tiles = nullptr;  // of keys, or of values
  int64_t n_tiles = 0;
  // scores: keys [first, end) are visible, counted from the first of tiles[0].
  int64_t first = 0;
  int64_t end = 0;
  float* scores = nullptr;        // [group][stride]
  float* value_scales = nullptr;  // [n_tiles * 16]
  int64_t stride = 0;
  // values: of the keys of these tiles, as weigh left them.
  const int16_t* weights = nullptr;  // [group][weight_stride]
  int64_t weight_stride = 0;
  int32_t* sums = nullptr;  // [group][padded]
};

// One head's softmax over one segment.
struct SegmentSum {
  float max = 0;     // of the scores
  float sum = 0;     // of e^(score - max)
  float weight = 0;  // what one of the integer weights is worth
};

// What the segments so far have given one head. `out` [padded] belongs to it.
struct AttentionState {
  float max = -__builtin_inff();
  float sum = 0;
};

struct TileKernels {
  // scores of keys, and the scales of their values; those that are not visible get -inf and 0.
  void (*scores)(const TileArgs& args);
  // Scores [n] (a multiple of 16) of one head and segment become weights, int16 from the same address on.
  SegmentSum (*weigh)(float* scores, int64_t n, const float* value_scales);
  // sums += weights * values
  void (*values)(const TileArgs& args);
  // out [padded] takes in the integer sums of a segment.
  void (*merge)(const SegmentSum& segment, const int32_t* sums, int64_t padded, AttentionState* state, float* out);
};

// By type: int8, int4.
struct TileTable {
  TileKernels kernels[2];
  // Takes in f16 keys and values (of the tail), as if they were a segment. args.out and args.scores are scratch.
  void (*add_rows)(const AttentionArgs& args, AttentionState* states, float* out, int64_t padded);
  const TileKernels& of(KvType type) const { return kernels[static_cast<int>(type) - 1]; }
};

const TileTable& tile_table_ref();
// Compiled on x86-64 only; the caller has checked that the machine runs the ISA.
const TileTable& tile_table_avx2();
const TileTable& tile_table_avx512vnni();
// Compiled on aarch64 only.
const TileTable& tile_table_neon();
const TileTable& tile_table_neon_dotprod();

}  // namespace edge
