// How weights lie in memory and in the pack: tiles of 16 rows (layouts in DESIGN.md, "Tiles").
#pragma once

#include <cstdint>

namespace edge {

enum class WeightFormat : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kQ8_0 = 3,
  kQ4_0 = 4,
  kQ4_K = 5,
  kQ6_K = 6,
  kF32Vector = 100,  // norms, biases, tables: plain f32
  kBytes = 101,      // blobs
};

inline constexpr int kTileFormats = 7;
inline constexpr int64_t kTileRows = 16;

struct FormatTraits {
  const char* name;
  int64_t block_values;    // values of one row in one block along K
  int64_t tile_block_bytes;  // bytes of one block of 16 rows
};

inline constexpr FormatTraits kFormatTraits[kTileFormats] = {
    {"f32", 1, 64},      {"f16", 1, 32},      {"bf16", 1, 32},    {"q8_0", 32, 544},
    {"q4_0", 32, 288},   {"q4_k", 256, 2304}, {"q6_k", 256, 3360},
};

inline bool is_tile_format(WeightFormat format) { return static_cast<uint32_t>(format) < kTileFormats; }
inline const FormatTraits& traits(WeightFormat format) { return kFormatTraits[static_cast<uint32_t>(format)]; }

// Bytes of one tile: 16 rows of k values. k must be a multiple of block_values.
inline int64_t tile_stride_bytes(WeightFormat format, int64_t k) {
  return k / traits(format).block_values * traits(format).tile_block_bytes;
}
inline int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t tile_bytes(WeightFormat format, int64_t rows, int64_t k) {
  return tile_count(rows) * tile_stride_bytes(format, k);
}

}  // namespace edge
