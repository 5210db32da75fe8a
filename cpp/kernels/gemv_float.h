// F32, F16 and BF16 tiles for any vector ISA. Four chains per row by k % 4, each in K order, as gemv_ref.cc defines.
// Internal linkage: each includer compiles its own copy under its own flags.
//
// An Isa gives: V (a vector of floats), kLanes, kRows(vectors) = activation rows whose accumulators fit the registers
// together with `vectors` vectors of the tile, zero(), load(p), store(p, v), fma(a, b, c), add(a, b), set1(x),
// kPrefetchBytes. A Weight gives: kBytes of one value, load(p) -> Isa::V.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/gemv_driver.h"
#include "kernels/prefetch.h"

namespace edge {
namespace {

// Values of K whose weights stay in L1 (8 KiB of f32) while the rows of a slab pass over them.
constexpr int64_t kChunkValues = 128;
// Activation rows of one slab; their chains wait in 8 KiB of stack between two chunks.
constexpr int64_t kSlabRows = 32;
constexpr int kChains = 4;

// kRows activation rows x kVectors vectors of the tile, n values of K. chains: [kChains][16] per row.
template <typename Isa, typename Weight, int kRows, int kVectors, bool kPrefetch>
inline void float_steps(const uint8_t* w, int64_t n, const float* x, int64_t x_stride, float* chains) {
  using V = typename Isa::V;
  constexpr int64_t kStepBytes = kRowsPerTile * Weight::kBytes;
  V acc[kRows][kVectors][kChains];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
        acc[m][v][c] = Isa::load(chains + (m * kChains + c) * kRowsPerTile + v * Isa::kLanes);
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    const uint8_t* step = w + i * kStepBytes;
    if constexpr (kPrefetch) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kChains * kStepBytes; line += 64) prefetch_line(step + line + Isa::kPrefetchBytes);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V weight = Weight::load(step + c * kStepBytes + v * Isa::kLanes * Weight::kBytes);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
          acc[m][v][c] = Isa::fma(weight, Isa::set1(x[m * x_stride + i + c]), acc[m][v][c]);
      }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains - 1; ++c) {
    if (i + c >= n) break;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V weight = Weight::load(w + (i + c) * kStepBytes + v * Isa::kLanes * Weight::kBytes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m)
        acc[m][v][c] = Isa::fma(weight, Isa::set1(x[m * x_stride + i + c]), acc[m][v][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
        Isa::store(chains + (m * kChains + c) * kRowsPerTile + v * Isa::kLanes, acc[m][v][c]);
}

// n_rows in [1, kRows] rows at once over one part of the tile.
template <typename Isa, typename Weight, int kVectors, bool kPrefetch, int... kRows>
inline void float_rows(int64_t n_rows, std::integer_sequence<int, kRows...>, const uint8_t* w, int64_t n,
                       const float* x, int64_t x_stride, float* chains) {
  (void)((n_rows == kRows + 1 &&
          (float_steps<Isa, Weight, kRows + 1, kVectors, kPrefetch>(w, n, x, x_stride, chains), true)) ||
         ...);
}

template <typename Isa, typename Weight>
inline void run_float_tiles(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride,
                            int64_t n_rows, float* y, int64_t y_stride, int64_t tile_begin, int64_t tile_end) {
  constexpr int kAll = static_cast<int>(kRowsPerTile) / Isa::kLanes;
  constexpr int kPart = Isa::kPartVectors;  // vectors at once when several activation rows share the registers
  constexpr int64_t kStepBytes = kRowsPerTile * Weight::kBytes;
  const auto* w = reinterpret_cast<const uint8_t*>(tiles);
  const auto* x = reinterpret_cast<const float*>(acts);
  const int64_t x_stride = act_stride / static_cast<int64_t>(sizeof(float));
  alignas(64) float chains[kSlabRows * kChains * kRowsPerTile];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint8_t* tile_w = w + tile * k * kStepBytes;
    for (int64_t m0 = 0; m0 < n_rows; m0 += kSlabRows) {
      const int64_t slab = std::min(kSlabRows, n_rows - m0);
      std::fill_n(chains, slab * kChains * kRowsPerTile, 0.0f);
      if (slab == 1) {
        float_steps<Isa, Weight, 1, kAll, true>(tile_w, k, x + m0 * x_stride, x_stride, chains);
      } else {
        for (int64_t i = 0; i < k; i += kChunkValues) {
          const int64_t n = std::min(kChunkValues, k - i);
          const uint8_t* chunk = tile_w + i * kStepBytes;
          for (int64_t m = 0; m < slab; m += Isa::kMaxRows) {
            const int64_t rows = std::min<int64_t>(Isa::kMaxRows, slab - m);
            const float* rows_x = x + (m0 + m) * x_stride + i;
            for (int v = 0; v < kAll; v += kPart) {
              const uint8_t* part = chunk + v * Isa::kLanes * Weight::kBytes;
              float* rows_chains = chains + m * kChains * kRowsPerTile + v * Isa::kLanes;
              constexpr auto kCounts = std::make_integer_sequence<int, Isa::kMaxRows>();
              if (m0 == 0 && m == 0 && v == 0) {
                float_rows<Isa, Weight, kPart, true>(rows, kCounts, part, n, rows_x, x_stride, rows_chains);
              } else {
                float_rows<Isa, Weight, kPart, false>(rows, kCounts, part, n, rows_x, x_stride, rows_chains);
              }
            }
          }
        }
      }
      for (int64_t m = 0; m < slab; ++m) {
        const float* c = chains + m * kChains * kRowsPerTile;
        float* out = y + (m0 + m) * y_stride + tile * kRowsPerTile;
        for (int64_t r = 0; r < kRowsPerTile; r += Isa::kLanes) {
          const auto left = Isa::add(Isa::load(c + r), Isa::load(c + 16 + r));
          const auto right = Isa::add(Isa::load(c + 32 + r), Isa::load(c + 48 + r));
          Isa::store(out + r, Isa::add(left, right));
        }
      }
    }
  }
}

}  // namespace
}  // namespace edge
