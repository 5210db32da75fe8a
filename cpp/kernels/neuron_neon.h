// Eight lanes are two registers of four. Internal linkage: each includer compiles its own copy under its own flags.
#pragma once

#include <arm_neon.h>

#include "kernels/gemv_table.h"
#include "kernels/neon_dot.h"
#include "kernels/neuron_act.h"
#include "kernels/neuron_driver.h"
#include "kernels/neuron_table.h"

namespace edge {

QuantizeQ8x32 quantize_q8x32_neon;

namespace {

inline float32x4_t half4(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

struct Neon {
  struct Lanes {
    float32x4_t low, high;
  };
  static inline Lanes zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static inline Lanes halves(const uint8_t* p) { return {half4(p), half4(p + 8)}; }
  static inline Lanes load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static inline Lanes add(Lanes a, Lanes b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static inline Lanes mul(Lanes a, Lanes b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static inline float sum(Lanes a) {
    const float32x4_t four = vaddq_f32(a.low, a.high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static inline void scales(const uint8_t* p, float a, float* out) {
    vst1q_f32(out, vmulq_n_f32(half4(p), a));
    vst1q_f32(out + 4, vmulq_n_f32(half4(p + 8), a));
  }

  struct Quants {
    int8x16_t q[8][2];
  };
  static inline Quants bytes(const uint8_t* p) {
    Quants quants;
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        quants.q[s][h] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 32 * s + 16 * h), vdupq_n_u8(128)));
      }
    return quants;
  }
  static inline Quants nibbles(const uint8_t* p) {
    Quants quants;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const uint8x16_t pair = vld1q_u8(p + 32 * s + 16 * h);
        quants.q[s][h] = vreinterpretq_s8_u8(vandq_u8(pair, vdupq_n_u8(15)));
        quants.q[4 + s][h] = vreinterpretq_s8_u8(vshrq_n_u8(pair, 4));
      }
    return quants;
  }
  static inline Lanes dot(const Quants& w, const NeuronActGroup& act, int32x4_t low, int32x4_t high) {
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      low = dot4(low, w.q[s][0], vld1q_s8(act.q + 32 * s));
      high = dot4(high, w.q[s][1], vld1q_s8(act.q + 32 * s + 16));
    }
    return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
  }
  static inline Lanes dot_bytes(const Quants& w, const NeuronActGroup& act) {
    return dot(w, act, vdupq_n_s32(0), vdupq_n_s32(0));
  }
  static inline Lanes dot_nibbles(const Quants& w, const NeuronActGroup& act) {
    return dot(w, act, vmulq_n_s32(vld1q_s32(act.sum), -8), vmulq_n_s32(vld1q_s32(act.sum + 4), -8));
  }

  using V = float32x4_t;
  static constexpr int kWidth = 4;
  static inline V load_v(const float* p) { return vld1q_f32(p); }
  static inline void store_v(float* p, V v) { vst1q_f32(p, v); }
  static inline V add_v(V a, V b) { return vaddq_f32(a, b); }
  static inline void scaled16(int8x16_t q, float scale, V* out) {
    const int16x8_t words[2] = {vmovl_s8(vget_low_s8(q)), vmovl_s8(vget_high_s8(q))};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      out[2 * h] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[h]))), scale);
      out[2 * h + 1] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(words[h]))), scale);
    }
  }
  static inline void column_f16(const uint8_t* p, float scale, V (&out)[8]) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) out[v] = vmulq_n_f32(half4(p + 8 * v), scale);
  }
  static inline void column_q8(const uint8_t* p, float scale, V (&out)[8]) {
    scaled16(vreinterpretq_s8_u8(vld1q_u8(p)), scale, out);
    scaled16(vreinterpretq_s8_u8(vld1q_u8(p + 16)), scale, out + 4);
  }
  static inline void column_q4(const uint8_t* p, float scale, V (&out)[8]) {
    const uint8x16_t pair = vld1q_u8(p);
    const int8x16_t eight = vdupq_n_s8(8);
    scaled16(vsubq_s8(vreinterpretq_s8_u8(vandq_u8(pair, vdupq_n_u8(15))), eight), scale, out);
    scaled16(vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(pair, 4)), eight), scale, out + 4);
  }
};

}  // namespace

}  // namespace edge
