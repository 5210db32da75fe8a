// Integer products over tiles of keys and values: a register of sums holds 4 tokens, or 4 dimensions. Internal linkage:
// each includer compiles its own copy under its own flags.
#pragma once

#include "kernels/neon_dot.h"
#include "kernels/ops_isa_neon.h"
#include "kernels/ops_tiles.h"

namespace edge {
namespace {

struct NeonTiles : NeonIsa {
  static constexpr int kKeyHeads = 4;
  static constexpr int kValueHeads = 2;

  static int8x16_t word(const int8_t* q) {
    int32_t bits;
    __builtin_memcpy(&bits, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bits));
  }

  template <KvType kType, int kHeads>
  static void key_dots(const uint8_t* k, const int8_t* q, int64_t padded, const int32_t* q_sums, int32_t (*out)[16]) {
    for (int part = 0; part < 4; ++part) {
      int32x4_t sums[kHeads];
      for (int h = 0; h < kHeads; ++h) sums[h] = vdupq_n_s32(kType == KvType::kInt8 ? 0 : -8 * q_sums[h]);
      if constexpr (kType == KvType::kInt8) {
        for (int64_t d = 0; d < padded; d += 4) {
          const int8x16_t keys = vreinterpretq_s8_u8(vld1q_u8(k + d * 16 + part * 16));
          for (int h = 0; h < kHeads; ++h) sums[h] = dot4(sums[h], keys, word(q + h * padded + d));
        }
      } else {
        for (int64_t d = 0; d < padded; d += 32) {
          for (int64_t step = 0; step < 16; step += 4) {
            const uint8x16_t keys = vld1q_u8(k + d * 8 + step * 16 + part * 16);
            const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(keys, vdupq_n_u8(15)));
            const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(keys, 4));
            for (int h = 0; h < kHeads; ++h) {
              const int8_t* at = q + h * padded + d + step;
              sums[h] = dot4(dot4(sums[h], first, word(at)), second, word(at + 16));
            }
          }
        }
      }
      for (int h = 0; h < kHeads; ++h) vst1q_s32(out[h] + 4 * part, sums[h]);
    }
  }

  // 16 dims of two tokens: [token][0..7, 8..15] as int16.
  template <KvType kType>
  static void load_pair(const uint8_t* v, bool upper, int16x8_t (*out)[2]) {
    uint8x16x2_t tokens = vld2q_u8(v);
    for (int token = 0; token < 2; ++token) {
      int8x16_t values;
      if constexpr (kType == KvType::kInt8) {
        values = vreinterpretq_s8_u8(tokens.val[token]);
      } else {
        const uint8x16_t nibbles =
            upper ? vshrq_n_u8(tokens.val[token], 4) : vandq_u8(tokens.val[token], vdupq_n_u8(15));
        values = vsubq_s8(vreinterpretq_s8_u8(nibbles), vdupq_n_s8(8));
      }
      out[token][0] = vmovl_s8(vget_low_s8(values));
      out[token][1] = vmovl_s8(vget_high_s8(values));
    }
  }

  template <KvType kType, int kHeads>
  static void value_dots(const TileArgs& a, int64_t head, int64_t dim) {
    const int64_t padded = a.layout.padded(), pair_bytes = a.layout.data_bytes() / 8;
    for (int upper = 0; upper < 2; ++upper) {
      const int64_t offset = kType == KvType::kInt8 ? 2 * (dim + 16 * upper) : dim;
      int32x4_t sums[kHeads][4];
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < 4; ++i) sums[h][i] = vld1q_s32(a.sums + (head + h) * padded + dim + 16 * upper + 4 * i);
      }
      for (int64_t tile = 0; tile < a.n_tiles; ++tile) {
        const auto* v = reinterpret_cast<const uint8_t*>(a.tiles[tile]) + offset;
        const int16_t* w = a.weights + head * a.weight_stride + tile * kKvTileTokens;
        for (int i = 0; i < 8; ++i) {
          int16x8_t values[2][2];
          load_pair<kType>(v + i * pair_bytes, upper != 0, values);
          for (int h = 0; h < kHeads; ++h) {
            for (int token = 0; token < 2; ++token) {
              const int16_t weight = w[h * a.weight_stride + 2 * i + token];
              for (int j = 0; j < 2; ++j) {
                sums[h][2 * j] = vmlal_n_s16(sums[h][2 * j], vget_low_s16(values[token][j]), weight);
                sums[h][2 * j + 1] = vmlal_n_s16(sums[h][2 * j + 1], vget_high_s16(values[token][j]), weight);
              }
            }
          }
        }
      }
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < 4; ++i) vst1q_s32(a.sums + (head + h) * padded + dim + 16 * upper + 4 * i, sums[h][i]);
      }
    }
  }
};

constexpr TileTable kTable = ops::make_tile_table<NeonTiles>();

}  // namespace
}  // namespace edge
