// Integer dot products for ARMv8.2 SDOT. One 128-bit register holds 4 rows x 4 values of K, so a tile is four
// quarters; vdotq_laneq takes the activation group of four values from a lane of a register of 16.
#include <arm_neon.h>

#include "kernels/gemv_driver.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(neon);

namespace {

constexpr int kMaxRows = 8;
constexpr int kQuarters = 4;  // of a tile: 4 rows each
constexpr int64_t kPrefetchBytes = 2048;

inline int8x16_t load_signed(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
inline int8x16_t low_nibbles(uint8x16_t v) { return vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15))); }
inline int8x16_t high_nibbles(uint8x16_t v) { return vreinterpretq_s8_u8(vshrq_n_u8(v, 4)); }
inline float32x4_t load_halves(const uint8_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
inline void prefetch(const uint8_t* p, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + kPrefetchBytes + i);
}

// acc + dot of four groups of four values with 16 activations.
inline int32x4_t dot16(int32x4_t acc, const int8x16_t* w, int8x16_t a) {
  acc = vdotq_laneq_s32(acc, w[0], a, 0);
  acc = vdotq_laneq_s32(acc, w[1], a, 1);
  acc = vdotq_laneq_s32(acc, w[2], a, 2);
  return vdotq_laneq_s32(acc, w[3], a, 3);
}

// acc + isum * (d_w * d_a), rounded as the definition says.
inline float32x4_t accumulate(int32x4_t isum, float32x4_t d_w, float d_a, float32x4_t acc) {
  return vfmaq_f32(acc, vcvtq_f32_s32(isum), vmulq_n_f32(d_w, d_a));
}

template <int kRows>
struct Sums {
  float32x4_t acc[kRows][kQuarters];

  inline Sums() {
    for (auto& row : acc)
      for (float32x4_t& quarter : row) quarter = vdupq_n_f32(0);
  }
  inline void store(float* y, int64_t y_stride) const {
    for (int m = 0; m < kRows; ++m)
      for (int r = 0; r < kQuarters; ++r) vst1q_f32(y + m * y_stride + 4 * r, acc[m][r]);
  }
};

// Q8_0 and Q4_0: Unpack makes 8 vectors (32 values of K) of one quarter; kOffset is what their values carry too much.
template <int64_t kBytes, int kOffset, typename Unpack>
struct Block32 {
  static constexpr int64_t kBlockValues = 32;
  static constexpr int64_t kBlockBytes = kBytes;

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<kRows> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += kBytes, acts += sizeof(ActQ8x32)) {
      prefetch(w, kBytes);
      for (int r = 0; r < kQuarters; ++r) {
        int8x16_t values[8];
        Unpack::run(w + 32 + 16 * r, values);
        const float32x4_t d = load_halves(w + 8 * r);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x32*>(acts + m * act_stride);
          int32x4_t isum = vdupq_n_s32(-kOffset * a->sum);
          isum = dot16(isum, values, vld1q_s8(a->q));
          isum = dot16(isum, values + 4, vld1q_s8(a->q + 16));
          sums.acc[m][r] = accumulate(isum, d, a->d, sums.acc[m][r]);
        }
      }
    }
    sums.store(y, y_stride);
  }
};

struct UnpackQ8_0 {
  static inline void run(const uint8_t* q, int8x16_t (&values)[8]) {
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) values[s] = veorq_s8(load_signed(q + 64 * s), vdupq_n_s8(-128));
  }
};

struct UnpackQ4_0 {
  static inline void run(const uint8_t* q, int8x16_t (&values)[8]) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const uint8x16_t both = vld1q_u8(q + 64 * s);
      values[s] = low_nibbles(both);
      values[4 + s] = high_nibbles(both);
    }
  }
};

using Q8_0 = Block32<544, 0, UnpackQ8_0>;
using Q4_0 = Block32<288, 8, UnpackQ4_0>;

struct Q4_K {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = 2304;

  static inline void put_wide(uint8x16_t values, int16_t* out) {
    vst1q_s16(out, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(values))));
    vst1q_s16(out + 8, vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(values))));
  }

  // Scales and mins of the 8 sub-blocks for 16 rows.
  static inline void unpack_scales(const uint8_t* w, int16_t (&scale)[8][16], int16_t (&min)[8][16]) {
    const uint8x16_t low4 = vdupq_n_u8(0x0f);
    const uint8x16_t high2 = vdupq_n_u8(0x30);
    for (int p = 0; p < 4; ++p) {
      const uint8x16_t even = vld1q_u8(w + 64 + 32 * p);
      const uint8x16_t odd = vld1q_u8(w + 64 + 32 * p + 16);
      const uint8x16_t top = vld1q_u8(w + 192 + 16 * p);
      put_wide(vorrq_u8(vandq_u8(even, low4), vandq_u8(vshlq_n_u8(top, 4), high2)), scale[2 * p]);
      put_wide(vorrq_u8(vandq_u8(odd, low4), vandq_u8(top, high2)), scale[2 * p + 1]);
      put_wide(vorrq_u8(vshrq_n_u8(even, 4), vandq_u8(vshlq_n_u8(top, 2), high2)), min[2 * p]);
      put_wide(vorrq_u8(vshrq_n_u8(odd, 4), vandq_u8(vshrq_n_u8(top, 2), high2)), min[2 * p + 1]);
    }
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<kRows> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x256)) {
      int16_t scale[8][16], min[8][16];
      unpack_scales(w, scale, min);
      for (int r = 0; r < kQuarters; ++r) {
        int32x4_t isum[kRows];
        for (int m = 0; m < kRows; ++m) isum[m] = vdupq_n_s32(0);
        for (int p = 0; p < 4; ++p) {
          prefetch(w + 144 * (4 * r + p), 144);
          int8x16_t low[8], high[8];
#pragma GCC unroll 8
          for (int s = 0; s < 8; ++s) {
            const uint8x16_t both = vld1q_u8(w + 256 + 512 * p + 64 * s + 16 * r);
            low[s] = low_nibbles(both);
            high[s] = high_nibbles(both);
          }
          const int32x4_t even_scale = vmovl_s16(vld1_s16(scale[2 * p] + 4 * r));
          const int32x4_t odd_scale = vmovl_s16(vld1_s16(scale[2 * p + 1] + 4 * r));
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) {
            const int8_t* q = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride)->q + 64 * p;
            int32x4_t even = dot16(vdupq_n_s32(0), low, vld1q_s8(q));
            even = dot16(even, low + 4, vld1q_s8(q + 16));
            int32x4_t odd = dot16(vdupq_n_s32(0), high, vld1q_s8(q + 32));
            odd = dot16(odd, high + 4, vld1q_s8(q + 48));
            isum[m] = vmlaq_s32(vmlaq_s32(isum[m], even, even_scale), odd, odd_scale);
          }
        }
        const float32x4_t d = load_halves(w + 8 * r);
        const float32x4_t dmin = load_halves(w + 32 + 8 * r);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          // Two groups of 16 to a sub-block: |sum| <= 32 * 127 fits int16.
          const int16x8_t group_sums = vpaddq_s16(vld1q_s16(a->sums), vld1q_s16(a->sums + 8));
          int32x4_t msum = vdupq_n_s32(0);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[0] + 4 * r), group_sums, 0);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[1] + 4 * r), group_sums, 1);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[2] + 4 * r), group_sums, 2);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[3] + 4 * r), group_sums, 3);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[4] + 4 * r), group_sums, 4);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[5] + 4 * r), group_sums, 5);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[6] + 4 * r), group_sums, 6);
          msum = vmlal_laneq_s16(msum, vld1_s16(min[7] + 4 * r), group_sums, 7);
          const float32x4_t acc = accumulate(isum[m], d, a->d, sums.acc[m][r]);
          sums.acc[m][r] = vfmsq_f32(acc, vcvtq_f32_s32(msum), vmulq_n_f32(dmin, a->d));
        }
      }
    }
    sums.store(y, y_stride);
  }
};

struct Q6_K {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = 3360;

  // q - 32 of sub-block 4u+i, one quarter.
  template <int i>
  static inline void unpack(const uint8_t* low, const uint8_t* high, int8x16_t (&values)[8]) {
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      const uint8x16_t both = vld1q_u8(low + 64 * s);
      uint8x16_t top = vld1q_u8(high + 64 * s);
      if constexpr (i == 0) top = vshlq_n_u8(top, 4);
      if constexpr (i == 1) top = vshlq_n_u8(top, 2);
      if constexpr (i == 3) top = vshrq_n_u8(top, 2);
      const uint8x16_t nibble = i % 2 == 0 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
      const uint8x16_t q = vorrq_u8(nibble, vandq_u8(top, vdupq_n_u8(0x30)));
      values[s] = vsubq_s8(vreinterpretq_s8_u8(q), vdupq_n_s8(32));
    }
  }

  template <int i, int kRows>
  static inline void sub_block(const uint8_t* w, int u, int r, const uint8_t* acts, int64_t act_stride,
                               int32x4_t (&isum)[kRows]) {
    const int j = 4 * u + i;
    int8x16_t values[8];
    unpack<i>(w + 288 + 512 * (2 * u + i / 2) + 16 * r, w + 2336 + 512 * u + 16 * r, values);
    // 8 scales are read for the 4 that count: the next rows', or the quants after them, lie in the same block.
    const auto* scales = reinterpret_cast<const int8_t*>(w + 32 + 4 * r);
    const int32x4_t scale0 = vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(scales + 32 * j))));
    const int32x4_t scale1 = vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(scales + 32 * j + 16))));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const int8_t* q = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride)->q + 32 * j;
      const int32x4_t dot0 = dot16(vdupq_n_s32(0), values, vld1q_s8(q));
      const int32x4_t dot1 = dot16(vdupq_n_s32(0), values + 4, vld1q_s8(q + 16));
      isum[m] = vmlaq_s32(vmlaq_s32(isum[m], dot0, scale0), dot1, scale1);
    }
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<kRows> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x256)) {
      for (int r = 0; r < kQuarters; ++r) {
        prefetch(w + 840 * r, 840);
        int32x4_t isum[kRows];
        for (int m = 0; m < kRows; ++m) isum[m] = vdupq_n_s32(0);
        for (int u = 0; u < 2; ++u) {
          sub_block<0>(w, u, r, acts, act_stride, isum);
          sub_block<1>(w, u, r, acts, act_stride, isum);
          sub_block<2>(w, u, r, acts, act_stride, isum);
          sub_block<3>(w, u, r, acts, act_stride, isum);
        }
        const float32x4_t d = load_halves(w + 8 * r);
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          sums.acc[m][r] = accumulate(isum[m], d, a->d, sums.acc[m][r]);
        }
      }
    }
    sums.store(y, y_stride);
  }
};

}  // namespace

EDGE_GEMV(gemv_q8_0_neon, run_tiles<Q8_0, kMaxRows>)
EDGE_GEMV(gemv_q4_0_neon, run_tiles<Q4_0, kMaxRows>)
EDGE_GEMV(gemv_q4_k_neon, run_tiles<Q4_K, kMaxRows>)
EDGE_GEMV(gemv_q6_k_neon, run_tiles<Q6_K, kMaxRows>)

}  // namespace edge
