// Products of a prompt with AMX: 16 activation rows times 16 rows of weights at once, int32 sums of int8 products, which
// are exact. A tile block is unpacked once for up to kMaxGroups groups of 16 activation rows, as signed bytes that lie as
// AMX wants its right operand, which is how the pack has them: for every four k, 4 bytes of 16 rows. Float steps are those
// of gemv_ref.cc, in its order. Fewer rows than a tile holds go another ISA's way. `Tiles` is AmxHardware or AmxModel.
// Internal linkage: only the _amx and _amx_model files include this, compiled as the _avx512vnni ones are.
#pragma once

#include <cstring>

#include "kernels/amx_tiles.h"
#include "kernels/gemv_lanes_avx512vnni.h"

namespace edge {
namespace {

constexpr int64_t kGroupRows = kAmxRows;
constexpr int kMaxGroups = 8;
constexpr int64_t kGroupSums = kGroupRows * kRowsPerTile;
// Of the activations that pass over one tile after the other, what stays in L2.
constexpr int64_t kActBytes = int64_t{1} << 20;

// Groups of 16 activation rows. The last begins earlier where rows do not come out even: what two groups have in common
// is computed twice, to the same bits.
struct Groups {
  const uint8_t* acts;
  int64_t act_stride;
  int64_t n_rows;  // at least kGroupRows
  int64_t first = 0;
  int n = 0;  // at most kMaxGroups

  int64_t row(int64_t g) const { return std::min((first + g) * kGroupRows, n_rows - kGroupRows); }
  const uint8_t* at(int64_t g) const { return acts + row(g) * act_stride; }
};

// n bytes of every lane of 16 bits from `low`, the others from `high`.
EDGE_INLINE __m512i join_bytes(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(0xff), low, high, 0xca);
}

// Formats under one scale for 32 values: an int32 sum of each block, as the float steps want it.
template <typename Tiles, WeightFormat kFormat>
struct AmxBlock32 {
  using F = Packed<Zmm, kFormat>;
  static constexpr int64_t kBlockValues = 32;
  static constexpr int64_t kBlockBytes = F::kBlockBytes;
  static constexpr int kBlocks = 8;  // under way at once
  static constexpr int kLag = 2;     // blocks from the product to the float steps, which run beside later products

  // Sums in tiles 0-3 in turn, activations in 4 and 5, weights in 6 and 7.
  static constexpr AmxConfig kShape = [] {
    AmxConfig config;
    for (int t = 0; t < 4; ++t) config.set(t, 16, 64);
    for (int t = 4; t < 6; ++t) config.set(t, 16, 32);
    for (int t = 6; t < 8; ++t) config.set(t, 8, 64);
    return config;
  }();

  struct alignas(64) Panel {
    uint8_t quants[kBlocks][512];
    float scales[kBlocks][kRowsPerTile];
  };

  static inline void fill(const uint8_t* w, int n_blocks, Panel& panel) {
    for (int b = 0; b < n_blocks; ++b, w += kBlockBytes) {
      F::template prefetch<0, (kBlockBytes + 63) / 64>(w);
      unroll<8>([&](auto s) EDGE_INLINE_BODY {
        const __m512i quants = F::template quants<0, s>(w, 0, 0);
        Zmm::put(panel.quants[b] + 64 * s, 0, _mm512_sub_epi8(quants, _mm512_set1_epi8(static_cast<char>(F::kOffset))));
      });
      Zmm::store(panel.scales[b], F::row_scales(w, 0));
    }
  }

  // sums[m][row] of one group goes on by n_blocks blocks.
  static inline void group(const Panel& panel, int n_blocks, const uint8_t* acts, int64_t act_stride, float* sums) {
    alignas(64) uint8_t products[4][kGroupRows][64];
    __m512 acc[kGroupRows];
#pragma GCC unroll 16
    for (int m = 0; m < kGroupRows; ++m) acc[m] = Zmm::load(sums + m * kRowsPerTile);
    for (int b = 0; b < n_blocks + kLag; b += 4) {
      unroll<4>([&](auto turn) EDGE_INLINE_BODY {
        const int begun = b + turn, done = begun - kLag;
        if (begun < n_blocks) {
          Tiles::template zero<turn>();
          Tiles::template load<4 + turn % 2>(block(acts, begun)->q, act_stride);
          Tiles::template load<6 + turn % 2>(panel.quants[begun], 64);
          Tiles::template multiply_add<turn, 4 + turn % 2, 6 + turn % 2>();
          Tiles::template store<turn>(products[turn], 64);
        }
        if (done >= 0 && done < n_blocks) {
          const __m512 d = Zmm::load(panel.scales[done]);
          const auto& found = products[(turn + 4 - kLag) % 4];
#pragma GCC unroll 16
          for (int m = 0; m < kGroupRows; ++m) {
            acc[m] = Zmm::accumulate(Zmm::words(found[m], 0), d, block(acts + m * act_stride, done)->d, acc[m]);
          }
        }
      });
    }
#pragma GCC unroll 16
    for (int m = 0; m < kGroupRows; ++m) Zmm::store(sums + m * kRowsPerTile, acc[m]);
  }

  static inline void tile(const uint8_t* w, int64_t n_blocks, const Groups& groups, float (*sums)[kGroupSums]) {
    Panel panel;
    for (int64_t b = 0; b < n_blocks; b += kBlocks) {
      const int n = static_cast<int>(std::min<int64_t>(kBlocks, n_blocks - b));
      fill(w + b * kBlockBytes, n, panel);
      for (int g = 0; g < groups.n; ++g) {
        group(panel, n, groups.at(g) + b * static_cast<int64_t>(sizeof(ActQ8x32)), groups.act_stride, sums[g]);
      }
    }
  }

 private:
  static inline const ActQ8x32* block(const uint8_t* acts, int b) { return reinterpret_cast<const ActQ8x32*>(acts) + b; }
};

// Formats under scales of their own for every 32 or 16 of 256 values. These scales are multiplied into the quants, so that
// one int32 sum of all 256 comes out of the tiles: the products fit one signed byte (Q2_K: 0..45; Q3_K: -128..124 when
// negated), or are 128 times one signed byte plus another of 0..127.
template <typename Tiles, WeightFormat kFormat>
struct AmxBlock256 {
  using F = Packed<Zmm, kFormat>;
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = F::kBlockBytes;
  static constexpr bool kNegated = kFormat == WeightFormat::kQ3_K;
  static constexpr bool kTwoBytes = !kNegated && kFormat != WeightFormat::kQ2_K;
  static constexpr int kRuns = 8, kSteps = 4;  // a step takes 64 values: two runs

  // Sums of two groups, low and high, in tiles 0-3; activations of two groups in 4 and 5, weights in 6 and 7.
  static constexpr AmxConfig kShape = [] {
    AmxConfig config;
    for (int t = 0; t < kAmxTiles; ++t) config.set(t, 16, 64);
    return config;
  }();

  struct alignas(64) Panel {
    uint8_t low[256 * kRowsPerTile];
    uint8_t high[kTwoBytes ? 256 * kRowsPerTile : 1];
  };
  // Of two groups.
  struct alignas(64) Products {
    uint8_t low[2][kGroupRows][64];
    uint8_t high[kTwoBytes ? 2 : 1][kTwoBytes ? kGroupRows : 1][64];
  };
  struct Scales {
    __m512 d, dmin;
    __m512i min[kRuns];
  };

  // Both int16 of every word to be the one of `half`.
  template <int half>
  EDGE_INLINE static __m512i twice(__m512i pair) {
    constexpr int kOrder = half == 0 ? 0x01000100 : 0x03020302;
    const __m128i order = _mm_add_epi32(_mm_set1_epi32(kOrder), _mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    return _mm512_shuffle_epi8(pair, _mm512_broadcast_i32x4(order));
  }

  // A word of four quants of every row times its scale, at `at` of the panel.
  EDGE_INLINE static void put(Panel& panel, int at, __m512i quants, __m512i scale) {
    const auto scaled = [&](__m512i q) EDGE_INLINE_BODY {
      const __m512i offset = _mm512_set1_epi16(F::kOffset);
      if constexpr (kNegated) return _mm512_mullo_epi16(_mm512_sub_epi16(offset, q), scale);
      return _mm512_mullo_epi16(F::kOffset == 0 ? q : _mm512_sub_epi16(q, offset), scale);
    };
    const __m512i even = scaled(_mm512_and_si512(quants, _mm512_set1_epi16(0xff)));
    const __m512i odd = scaled(_mm512_srli_epi16(quants, 8));
    const __m512i low = join_bytes(even, _mm512_slli_epi16(odd, 8));
    if constexpr (kTwoBytes) {
      Zmm::put(panel.low + at, 0, _mm512_and_si512(low, _mm512_set1_epi8(127)));
      Zmm::put(panel.high + at, 0, join_bytes(_mm512_srli_epi16(even, 7), _mm512_slli_epi16(odd, 1)));
    } else {
      Zmm::put(panel.low + at, 0, low);
    }
  }

  static inline void fill(const uint8_t* w, Panel& panel) {
    F::template prefetch<0, (kBlockBytes + 63) / 64>(w);
    __m512i scale[kRuns];
    unroll<kRuns>([&](auto j) EDGE_INLINE_BODY { scale[j] = F::template scale<j>(w, 0); });
    for (int u = 0; u < kRuns / F::kPeriod; ++u) {
      unroll<F::kPeriod>([&](auto i) EDGE_INLINE_BODY {
        const int run = u * F::kPeriod + i;
        const __m512i scales[2] = {twice<0>(scale[run]), twice<1>(scale[run])};
        unroll<8>([&](auto s) EDGE_INLINE_BODY {
          put(panel, 64 * (8 * run + s), F::template quants<i, s>(w, u, 0), scales[s / 4]);
        });
      });
    }
  }

  // Both sums of a group go on by one step.
  template <int which>
  EDGE_INLINE static void multiply(const uint8_t* q, int64_t act_stride) {
    Tiles::template load<4 + which>(q, act_stride);
    Tiles::template multiply_add<2 * which, 4 + which, 6>();
    if constexpr (kTwoBytes) Tiles::template multiply_add<2 * which + 1, 4 + which, 7>();
  }
  EDGE_INLINE static void multiply_step(const Panel& panel, int step, const uint8_t* const* acts, int n,
                                        int64_t act_stride) {
    const int64_t at = static_cast<int64_t>(offsetof(ActQ8x256, q)) + 64 * step;
    Tiles::template load<6>(panel.low + 1024 * step, 64);
    if constexpr (kTwoBytes) Tiles::template load<7>(panel.high + 1024 * step, 64);
    multiply<0>(acts[0] + at, act_stride);
    if (n == 2) multiply<1>(acts[1] + at, act_stride);
  }
  EDGE_INLINE static void zero_sums() {
    Tiles::template zero<0>();
    Tiles::template zero<2>();
    if constexpr (kTwoBytes) {
      Tiles::template zero<1>();
      Tiles::template zero<3>();
    }
  }
  template <int which>
  EDGE_INLINE static void store_sums(Products& products) {
    Tiles::template store<2 * which>(products.low[which], 64);
    if constexpr (kTwoBytes) Tiles::template store<2 * which + 1>(products.high[which], 64);
  }

  // The float steps of four activation rows, from row m of a group.
  EDGE_INLINE static void add_rows(const Products& products, int which, int m, const Scales& scales,
                                   const uint8_t* acts, int64_t act_stride, float* sums) {
#pragma GCC unroll 4
    for (int i = m; i < m + 4; ++i) {
      const auto* act = reinterpret_cast<const ActQ8x256*>(acts + i * act_stride);
      __m512i isum = Zmm::words(products.low[which][i], 0);
      if constexpr (kTwoBytes) isum = Zmm::add(isum, Zmm::times_power<7>(Zmm::words(products.high[which][i], 0)));
      __m512 acc = Zmm::load(sums + i * kRowsPerTile);
      acc = kNegated ? Zmm::reduce(isum, scales.d, act->d, acc) : Zmm::accumulate(isum, scales.d, act->d, acc);
      if constexpr (F::kHasMins) {
        __m512i msum = Zmm::zero();
#pragma GCC unroll 8
        for (int j = 0; j < kRuns; ++j) {
          msum = Zmm::dot_pairs(msum, scales.min[j], Zmm::broadcast4(act->sums + 2 * j));
        }
        acc = Zmm::reduce(msum, scales.dmin, act->d, acc);
      }
      Zmm::store(sums + i * kRowsPerTile, acc);
    }
  }

  // All groups with the panel of one block, whose activations begin at acts[g]: the float steps of two groups among the
  // products of the next two.
  static inline void multiply_block(const Panel& panel, const Scales& scales, const uint8_t* const* acts,
                                    const Groups& groups, float (*sums)[kGroupSums]) {
    Products products[2];
    for (int g = 0; g < groups.n + 2; g += 2) {
      const int begun = std::min(2, groups.n - g), done = g == 0 ? 0 : std::min(2, groups.n - (g - 2));
      if (begun > 0) zero_sums();
      for (int step = 0; step < kSteps; ++step) {
        if (begun > 0) multiply_step(panel, step, acts + g, begun, groups.act_stride);
        for (int which = 0; which < done; ++which) {
          add_rows(products[(g / 2 + 1) % 2], which, 4 * step, scales, acts[g - 2 + which], groups.act_stride,
                   sums[g - 2 + which]);
        }
      }
      if (begun > 0) store_sums<0>(products[g / 2 % 2]);
      if (begun > 1) store_sums<1>(products[g / 2 % 2]);
    }
  }

  static inline void tile(const uint8_t* w, int64_t n_blocks, const Groups& groups, float (*sums)[kGroupSums]) {
    Panel panel;
    const uint8_t* acts[kMaxGroups];
    for (int g = 0; g < groups.n; ++g) acts[g] = groups.at(g);
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes) {
      fill(w, panel);
      Scales scales;
      scales.d = F::row_scales(w, 0);
      if constexpr (F::kHasMins) {
        scales.dmin = F::min_scales(w, 0);
        unroll<kRuns>([&](auto j) EDGE_INLINE_BODY { scales.min[j] = F::template min<j>(w, 0); });
      }
      multiply_block(panel, scales, acts, groups, sums);
      for (int g = 0; g < groups.n; ++g) acts[g] += sizeof(ActQ8x256);
    }
  }
};

// GemvFn over tiles; `kFewRows` where there are fewer rows than a group has.
template <typename Tiles, typename Block, GemvFn kFewRows>
inline void run_amx(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride, int64_t n_rows,
                    float* y, int64_t y_stride, int64_t tile_begin, int64_t tile_end) {
  if (n_rows < kGroupRows) {
    kFewRows(tiles, k, acts, act_stride, n_rows, y, y_stride, tile_begin, tile_end);
    return;
  }
  const AmxShape<Tiles> shape(Block::kShape);
  const int64_t n_blocks = k / Block::kBlockValues, stride = n_blocks * Block::kBlockBytes;
  const int64_t n_groups = (n_rows + kGroupRows - 1) / kGroupRows;
  const int64_t tiles_at_once = std::max<int64_t>(1, kTileGroupBytes / std::max<int64_t>(1, stride));
  const int64_t pairs_at_once = kActBytes / std::max<int64_t>(1, 2 * kGroupRows * act_stride);
  const int64_t groups_at_once = 2 * std::clamp<int64_t>(pairs_at_once, 1, kMaxGroups / 2);
  alignas(64) float sums[kMaxGroups][kGroupSums];
  for (int64_t first = tile_begin; first < tile_end; first += tiles_at_once) {
    const int64_t last = std::min(first + tiles_at_once, tile_end);
    Groups groups{reinterpret_cast<const uint8_t*>(acts), act_stride, n_rows};
    for (; groups.first < n_groups; groups.first += groups.n) {
      groups.n = static_cast<int>(std::min(groups_at_once, n_groups - groups.first));
      for (int64_t tile = first; tile < last; ++tile) {
        std::memset(sums, 0, static_cast<size_t>(groups.n) * sizeof sums[0]);
        Block::tile(reinterpret_cast<const uint8_t*>(tiles) + tile * stride, n_blocks, groups, sums);
        for (int g = 0; g < groups.n; ++g) {
          float* to = y + groups.row(g) * y_stride + tile * kRowsPerTile;
          for (int64_t m = 0; m < kGroupRows; ++m) Zmm::store(to + m * y_stride, Zmm::load(sums[g] + m * kRowsPerTile));
        }
      }
    }
  }
}

// As fast as tiles multiply: enough sums that none waits for the one before, and nothing is read. A product of tiles is so
// many of a vector's that fewer steps take as long.
template <typename Tiles>
inline int64_t multiply_int8_tiles(int64_t n_steps) {
  constexpr int kSums = 6;
  constexpr AmxConfig kShape = AmxBlock256<Tiles, WeightFormat::kQ4_K>::kShape;
  const AmxShape<Tiles> shape(kShape);
  unroll<kAmxTiles>([](auto t) EDGE_INLINE_BODY { Tiles::template zero<t>(); });
  const int64_t n = (n_steps + 63) / 64;
  for (int64_t i = 0; i < n; ++i) {
    unroll<kSums>([](auto t) EDGE_INLINE_BODY { Tiles::template multiply_add<t, 6, 7>(); });
  }
  return n * kSums * (kAmxRows * kAmxRows * int64_t{kAmxRowBytes});
}

}  // namespace

// Defines gemv_<format>_<isa> of every quantised format of a kind; the file names its tiles `Tiles`.
#define EDGE_GEMV_AMX32(isa, code, enumerator, name, ...) \
  EDGE_GEMV(gemv_##name##_##isa, run_amx<Tiles, AmxBlock32<Tiles, WeightFormat::enumerator>, gemv_##name##_avx512vnni>)
#define EDGE_GEMV_AMX256(isa, code, enumerator, name, ...) \
  EDGE_GEMV(gemv_##name##_##isa, run_amx<Tiles, AmxBlock256<Tiles, WeightFormat::enumerator>, gemv_##name##_avx512vnni>)

}  // namespace edge
