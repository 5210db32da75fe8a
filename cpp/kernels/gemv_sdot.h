// ARMv8.2 SDOT: vdotq_laneq takes the activations of four values from a lane of a register of 16. Internal linkage: only
// files compiled with +dotprod include this.
#pragma once

#include "kernels/gemv_neon.h"

namespace edge {
namespace {

struct Sdot {
  using Words = Neon::Words;
  static constexpr int kMaxRows = 8;

  static inline Words multiply_add(Words sum, Words a, Words b) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }

  template <typename F, int n>
  EDGE_INLINE static Words dot(Words sum, const int8x16_t* values, const uint8_t* q) {
    unroll<n / 4>([&](auto at) EDGE_INLINE_BODY {
      const int8x16_t a = vreinterpretq_s8_u8(vld1q_u8(q + 16 * at));
      unroll<4>([&](auto s) EDGE_INLINE_BODY { sum = vdotq_laneq_s32(sum, values[4 * at + s], a, s); });
    });
    return sum;
  }
};

}  // namespace
}  // namespace edge
