// Sums of four int8 products. Internal linkage: each includer compiles its own copy under its own flags.
#pragma once

#include <arm_neon.h>

namespace edge {
namespace {

// sum[i] + a[4i..4i+3] * b[4i..4i+3]: one instruction where this file is compiled for dot products.
inline int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

}  // namespace
}  // namespace edge
