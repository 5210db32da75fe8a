// A 128-bit register holds 4 rows x 4 values of K, so a tile is four parts: what the NEON ISAs share. All but the
// products needs ARMv8.0 alone. Internal linkage: each includer compiles its own copy under its own flags.
#pragma once

#include <arm_neon.h>

#include "kernels/gemv_core.h"

namespace edge {
namespace {

struct Neon {
  using Words = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kParts = 4;
  static constexpr int64_t kPrefetchBytes = 2048;

  static inline uint8x16_t u8(Words x) { return vreinterpretq_u8_s32(x); }
  static inline uint16x8_t u16(Words x) { return vreinterpretq_u16_s32(x); }
  static inline int16x8_t s16(Words x) { return vreinterpretq_s16_s32(x); }
  static inline Words from(uint8x16_t x) { return vreinterpretq_s32_u8(x); }

  static inline uint8x8_t load4(const uint8_t* p) {
    uint32_t value;
    __builtin_memcpy(&value, p, 4);
    return vcreate_u8(value);
  }
  static inline Words words(const uint8_t* p, int part) { return from(vld1q_u8(p + 16 * part)); }
  static inline Words halves(const uint8_t* p, int part) {
    return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * part))));
  }
  static inline Words byte_pairs(const uint8_t* p, int part) {
    const uint16x4_t bytes = vget_low_u16(vmovl_u8(load4(p + 4 * part)));
    return vreinterpretq_s32_u16(vcombine_u16(vzip1_u16(bytes, bytes), vzip2_u16(bytes, bytes)));
  }
  static inline Words signed_pair(const uint8_t* a, const uint8_t* b, int part) {
    const uint8x8_t bytes = vzip1_u8(load4(a + 4 * part), load4(b + 4 * part));
    return vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(bytes)));
  }
  static inline Floats float_halves(const uint8_t* p, int part) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * part)));
  }
  template <Scales kScales>
  static inline Floats row_scales(const uint8_t* w, int part) {
    if constexpr (kScales != Scales::kExponent) return float_halves(w, part);
    // 2^(x - 128); the two smallest are subnormal.
    const Words x = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load4(w + 4 * part)))));
    const Words normal = vmaxq_s32(x, vdupq_n_s32(2));
    const Words bits = vshlq_n_s32(vsubq_s32(normal, vdupq_n_s32(1)), 23);
    return vreinterpretq_f32_u32(vshlq_u32(vreinterpretq_u32_s32(bits), vsubq_s32(x, normal)));
  }

  template <int n>
  static inline Words shift(Words x) {
    if constexpr (n > 0) return vreinterpretq_s32_u16(vshrq_n_u16(u16(x), n));
    if constexpr (n < 0) return vreinterpretq_s32_u16(vshlq_n_u16(u16(x), -n));
    return x;
  }
  static inline Words mask(Words x, uint32_t bits) { return vandq_s32(x, vdupq_n_s32(static_cast<int32_t>(bits))); }
  template <int from_bit, int n, int to = 0>
  static inline Words bits(Words x) {
    if constexpr (from_bit + n == 8 && to == 0) return from(vshrq_n_u8(u8(x), from_bit));
    return from(vandq_u8(u8(shift<from_bit - to>(x)), vdupq_n_u8(((1 << n) - 1) << to)));
  }
  static inline Words either(Words a, Words b) { return vorrq_s32(a, b); }
  static inline Words lookup(const uint8_t (&table)[16], Words index) {
    return from(vqtbl1q_u8(vld1q_u8(table), u8(index)));
  }
  template <int a, int b>
  static inline Words spread(Words x) {
    constexpr uint32_t kOrder = 0x80008000u | b << 16 | a;  // beyond 15: a zero byte
    const uint32x4_t order = vaddq_u32(vdupq_n_u32(kOrder), uint32x4_t{0, 0x40004, 0x80008, 0xc000c});
    return from(vqtbl1q_u8(u8(x), vreinterpretq_u8_u32(order)));
  }
  static inline Words less32(Words x) { return vreinterpretq_s32_s16(vsubq_s16(s16(x), vdupq_n_s16(32))); }

  static inline Words first_of_pair(Words x) { return vshrq_n_s32(vshlq_n_s32(x, 16), 16); }
  static inline Words second_of_pair(Words x) { return vshrq_n_s32(x, 16); }

  static inline Words zero() { return vdupq_n_s32(0); }
  static inline Words subtract(Words a, Words b) { return vsubq_s32(a, b); }
  template <int n>
  static inline Words times_power(Words x) {
    return vshlq_n_s32(x, n);
  }
  // Two int16 for every row.
  static inline Words broadcast4(const void* p) { return vld1q_dup_s32(static_cast<const int32_t*>(p)); }
  static inline Words dot_pairs(Words sum, Words a, Words b) {
    const int32x4_t low = vmull_s16(vget_low_s16(s16(a)), vget_low_s16(s16(b)));
    return vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(s16(a), s16(b))));
  }

  static inline Floats zero_floats() { return vdupq_n_f32(0); }
  static inline void store(float* y, Floats x) { vst1q_f32(y, x); }
  // acc +- isum * (d_w * d_a), rounded as the definition says.
  static inline Floats accumulate(Words isum, Floats d_w, float d_a, Floats acc) {
    return vfmaq_f32(acc, vcvtq_f32_s32(isum), vmulq_n_f32(d_w, d_a));
  }
  static inline Floats reduce(Words isum, Floats d_w, float d_a, Floats acc) {
    return vfmsq_f32(acc, vcvtq_f32_s32(isum), vmulq_n_f32(d_w, d_a));
  }
};

// The integer steps over Dot::dot<F, n>(sum, values, q): sum + n words of values times 4n activations, exact.
template <typename Dot>
struct NeonLanes : Neon {
  static constexpr int kMaxRows = Dot::kMaxRows;
  template <typename F>
  static constexpr bool kSigned = true;

  static inline Words multiply_add(Words sum, Words a, Words b) { return Dot::multiply_add(sum, a, b); }

  template <typename F, int i>
  EDGE_INLINE static void unpack(const uint8_t* w, int u, int part, int8x16_t (&values)[8]) {
    unroll<8>([&](auto s) EDGE_INLINE_BODY {
      const uint8x16_t quants = u8(F::template quants<i, s>(w, u, part));
      values[s] = vreinterpretq_s8_u8(F::kOffset == 0 ? quants : vsubq_u8(quants, vdupq_n_u8(F::kOffset)));
    });
  }

  template <typename F, int kRows>
  EDGE_INLINE static void dots(const uint8_t* w, int part, const uint8_t* q, int64_t act_stride,
                               Words (&isum)[kRows]) {
    int8x16_t values[8];
    unpack<F, 0>(w, 0, part, values);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, q += act_stride) isum[m] = Dot::template dot<F, 8>(isum[m], values, q);
  }

  template <typename F, int i, int kRows>
  EDGE_INLINE static void run(const uint8_t* w, int u, int part, const uint8_t* q, int64_t act_stride, Words scale,
                              Words (&isum)[kRows]) {
    int8x16_t values[8];
    unpack<F, i>(w, u, part, values);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, q += act_stride) {
      if constexpr (F::kGroup == 32) {
        isum[m] = vmlaq_s32(isum[m], Dot::template dot<F, 8>(zero(), values, q), second_of_pair(scale));
      } else {
        isum[m] = vmlaq_s32(isum[m], Dot::template dot<F, 4>(zero(), values, q), first_of_pair(scale));
        isum[m] = vmlaq_s32(isum[m], Dot::template dot<F, 4>(zero(), values + 4, q + 16), second_of_pair(scale));
      }
    }
  }
};

}  // namespace
}  // namespace edge
