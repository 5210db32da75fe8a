// ARMv8.0, which every aarch64 CPU has: SMULL and SMLAL multiply bytes into int16 sums, as many words as int16 holds
// before they are widened. Internal linkage: only the _neon files include this.
#pragma once

#include <algorithm>
#include <bit>

#include "kernels/gemv_neon.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(neon);

namespace {

struct Widening {
  using Words = Neon::Words;
  static constexpr int kMaxRows = 4;  // 8 would spill more than a second pass over the tile costs

  static inline Words multiply_add(Words sum, Words a, Words b) {
    const int8x16_t left = vreinterpretq_s8_s32(a), right = vreinterpretq_s8_s32(b);
    return widen(sum, vmull_s8(vget_low_s8(left), vget_low_s8(right)), vmull_high_s8(left, right));
  }

  template <typename F, int n>
  EDGE_INLINE static Words dot(Words sum, const int8x16_t* values, const uint8_t* q) {
    constexpr unsigned kLargest = std::max(F::kOffset, F::kMaxQuant - F::kOffset);
    constexpr int kWords = std::min(static_cast<int>(std::bit_floor(32767u / (kLargest * 127u))), n);
    unroll<n / kWords>([&](auto at) EDGE_INLINE_BODY { sum = step<kWords, kWords * at>(sum, values, q); });
    return sum;
  }

 private:
  template <int n, int first>
  EDGE_INLINE static Words step(Words sum, const int8x16_t* values, const uint8_t* q) {
    int16x8_t low = vdupq_n_s16(0), high = low;
    unroll<n>([&](auto at) EDGE_INLINE_BODY {
      const int8x16_t value = values[first + at], a = vreinterpretq_s8_s32(Neon::broadcast4(q + 4 * (first + at)));
      low = at == 0 ? vmull_s8(vget_low_s8(value), vget_low_s8(a)) : vmlal_s8(low, vget_low_s8(value), vget_low_s8(a));
      high = at == 0 ? vmull_high_s8(value, a) : vmlal_high_s8(high, value, a);
    });
    return widen(sum, low, high);
  }
  static inline Words widen(Words sum, int16x8_t low, int16x8_t high) {
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
};

using Lanes = NeonLanes<Widening>;

}  // namespace
}  // namespace edge
