// The loops around one tile, shared by every vector ISA. Internal linkage: each includer compiles its own copy under
// its own flags, and none may be merged into another's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace edge {
namespace {

// A prompt chunk takes its rows in blocks; this many bytes of tiles stay in L2 while all blocks pass over them.
constexpr int64_t kTileGroupBytes = 256 * 1024;

constexpr int64_t kRowsPerTile = 16;

// From this many rows on a tile is unpacked once for all; so many rows' activations stay in L2 meanwhile.
constexpr int64_t kMinPanelRows = 32;
constexpr int64_t kPanelRows = 64;

// Runs Format::tile<m>(tile, n_blocks, acts, act_stride, y, y_stride) for m = n_rows in [1, kMaxRows].
template <typename Format, int... kRows>
inline void run_tile(int64_t n_rows, std::integer_sequence<int, kRows...>, const uint8_t* tile, int64_t n_blocks,
                     const uint8_t* acts, int64_t act_stride, float* y, int64_t y_stride) {
  (void)((n_rows == kRows + 1 &&
          (Format::template tile<kRows + 1>(tile, n_blocks, acts, act_stride, y, y_stride), true)) ||
         ...);
}

// One tile with n_rows rows, a multiple of kMaxRows and kPanelRows at most.
template <typename Format, int kMaxRows>
inline void run_panels(const uint8_t* tile, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, int64_t n_rows,
                       float* y, int64_t y_stride) {
  using Panel = typename Format::Panel;
  alignas(64) uint8_t panel[Panel::kBlockBytes];
  alignas(64) float sums[kPanelRows * kRowsPerTile] = {};
  for (int64_t b = 0; b < n_blocks; ++b, tile += Format::kBlockBytes, acts += Format::kActBytes) {
    Panel::fill(tile, panel);
    for (int64_t m = 0; m < n_rows; m += kMaxRows) {
      Format::FromPanel::template tile<kMaxRows>(panel, 1, acts + m * act_stride, act_stride, sums + m * kRowsPerTile,
                                                 kRowsPerTile);
    }
  }
  for (int64_t m = 0; m < n_rows; ++m) std::copy_n(sums + m * kRowsPerTile, kRowsPerTile, y + m * y_stride);
}

// GemvFn for formats whose tile is a run of blocks along K.
template <typename Format, int kMaxRows>
inline void run_tiles(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride, int64_t n_rows,
                      float* y, int64_t y_stride, int64_t tile_begin, int64_t tile_end) {
  const int64_t n_blocks = k / Format::kBlockValues;
  const int64_t stride = n_blocks * Format::kBlockBytes;
  const auto* w = reinterpret_cast<const uint8_t*>(tiles);
  const auto* a = reinterpret_cast<const uint8_t*>(acts);
  const int64_t group =
      n_rows <= kMaxRows ? tile_end - tile_begin : std::max<int64_t>(1, kTileGroupBytes / std::max<int64_t>(1, stride));
  const int64_t in_panels = Format::kPanels && n_rows >= kMinPanelRows ? n_rows / kMaxRows * kMaxRows : 0;
  for (int64_t first = tile_begin; first < tile_end; first += group) {
    const int64_t last = std::min(first + group, tile_end);
    if constexpr (Format::kPanels) {
      for (int64_t m = 0; m < in_panels; m += kPanelRows) {
        for (int64_t tile = first; tile < last; ++tile) {
          run_panels<Format, kMaxRows>(w + tile * stride, n_blocks, a + m * act_stride, act_stride,
                                       std::min(kPanelRows, in_panels - m), y + m * y_stride + tile * kRowsPerTile,
                                       y_stride);
        }
      }
    }
    for (int64_t m = in_panels; m < n_rows; m += kMaxRows) {
      for (int64_t tile = first; tile < last; ++tile) {
        run_tile<Format>(std::min<int64_t>(kMaxRows, n_rows - m), std::make_integer_sequence<int, kMaxRows>(),
                         w + tile * stride, n_blocks, a + m * act_stride, act_stride,
                         y + m * y_stride + tile * kRowsPerTile, y_stride);
      }
    }
  }
}

#define EDGE_GEMV(name, ...)                                                                                       \
  void name(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride, int64_t n_rows, float* y, \
            int64_t y_stride, int64_t tile_begin, int64_t tile_end) {                                              \
    __VA_ARGS__(tiles, k, acts, act_stride, n_rows, y, y_stride, tile_begin, tile_end);                            \
  }

}  // namespace
}  // namespace edge
