#include "kernels/gemv_check.h"

#include <cstring>
#include <vector>

namespace edge {
namespace {

constexpr int64_t kValues = 768;  // three blocks of 256
constexpr int64_t kTiles = 1;
constexpr int64_t kRows = 71;  // whole groups of 16, pairs of them, and some rows more

constexpr uint64_t kSeed = 88172645463325252u;

uint64_t next_random(uint64_t& state) {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// Tiles whose quants are any byte (or all the largest), under scales from 2^-7 to 2, or 2^-16 to 2^-9 where these are
// exponents.
std::vector<std::byte> some_tiles(WeightFormat format, bool largest, uint64_t& state) {
  const FormatTraits& of = traits(format);
  std::vector<std::byte> tiles(static_cast<size_t>(kTiles * tile_stride_bytes(format, kValues)));
  for (size_t at = 0; at + 8 <= tiles.size(); at += 8) {
    const uint64_t bytes = largest ? ~uint64_t{0} : next_random(state);
    std::memcpy(tiles.data() + at, &bytes, sizeof bytes);
  }
  for (size_t at = 0; at < tiles.size(); at += static_cast<size_t>(of.tile_block_bytes)) {
    const int n_scales = of.scales == Scales::kTwoHalves ? 32 : 16;
    for (int i = 0; i < n_scales; ++i) {
      if (of.scales == Scales::kExponent) {
        tiles[at + static_cast<size_t>(i)] = static_cast<std::byte>(112 + next_random(state) % 8);
      } else {
        const auto half = static_cast<uint16_t>(0x2000 + next_random(state) % 0x2000);
        std::memcpy(tiles.data() + at + 2 * i, &half, 2);
      }
    }
  }
  return tiles;
}

std::vector<std::byte> some_activations(const GemvTable& table, ActKind kind) {
  uint64_t state = kSeed;
  const int64_t stride = act_row_bytes(kind, kValues);
  std::vector<std::byte> acts(static_cast<size_t>(kRows * stride));
  float x[kValues];
  for (int64_t m = 0; m < kRows; ++m) {
    // Some rows are as large as int8 allows throughout.
    for (float& value : x) {
      value = static_cast<float>(next_random(state) >> 40) * 0x1p-23f - 1.0f;
      if (m % 4 == 1) value = value < 0 ? -1.0f : 1.0f;
      if (m % 8 == 2) value = 1.0f;
    }
    std::byte* row = acts.data() + m * stride;
    if (kind == ActKind::kQ8x32) table.quantize_q8x32(x, kValues, reinterpret_cast<ActQ8x32*>(row));
    if (kind == ActKind::kQ8x256) table.quantize_q8x256(x, kValues, reinterpret_cast<ActQ8x256*>(row));
  }
  return acts;
}

bool same_products(WeightFormat format, bool largest, const std::vector<std::byte>& acts, const GemvTable& found,
                   const GemvTable& expected) {
  uint64_t state = kSeed + static_cast<uint64_t>(format);
  const auto code = static_cast<size_t>(format);
  const std::vector<std::byte> tiles = some_tiles(format, largest, state);
  const int64_t act_stride = act_row_bytes(act_kind(format), kValues), y_stride = kTiles * kTileRows;
  for (const int64_t n_rows : {int64_t{16}, int64_t{33}, kRows}) {
    std::vector<float> y(static_cast<size_t>(n_rows * y_stride)), z(y.size());
    found.gemv[code](tiles.data(), kValues, acts.data(), act_stride, n_rows, y.data(), y_stride, 0, kTiles);
    expected.gemv[code](tiles.data(), kValues, acts.data(), act_stride, n_rows, z.data(), y_stride, 0, kTiles);
    if (std::memcmp(y.data(), z.data(), y.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace

std::string gemv_difference(const GemvTable& found, const GemvTable& expected) {
  for (const ActKind kind : {ActKind::kQ8x32, ActKind::kQ8x256}) {
    const std::vector<std::byte> acts = some_activations(expected, kind);
    for (int code = 0; code < kTileFormats; ++code) {
      const auto format = static_cast<WeightFormat>(code);
      if (act_kind(format) != kind) continue;
      for (const bool largest : {false, true}) {
        if (!same_products(format, largest, acts, found, expected)) {
          return std::string(traits(format).name) + " products";
        }
      }
    }
  }
  return "";
}

}  // namespace edge
