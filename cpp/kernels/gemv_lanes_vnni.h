// Integer steps with vpdpbusd: four unsigned bytes times four signed bytes into the row's int32, exact. `Base` is the
// vectors of one width. Internal linkage: each includer compiles its own copy under its own flags.
#pragma once

#include "kernels/gemv_core.h"

namespace edge {
namespace {

template <typename Base>
struct Vnni : Base {
  using Words = typename Base::Words;

  template <typename F>
  static constexpr bool kSigned = false;

  EDGE_INLINE static Words multiply_add(Words sum, Words a, Words b) { return Base::dot4(sum, a, b); }

  template <typename F, int i>
  EDGE_INLINE static void unpack(const uint8_t* w, int u, int part, Words (&values)[8]) {
    unroll<8>([&](auto s) EDGE_INLINE_BODY { values[s] = F::template quants<i, s>(w, u, part); });
  }

  // sum + four words of values times 16 activations.
  EDGE_INLINE static Words dot16(Words sum, const Words* values, const uint8_t* q) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sum = Base::dot4(sum, values[s], Base::broadcast4(q + 4 * s));
    return sum;
  }

  template <typename F, int kRows>
  EDGE_INLINE static void dots(const uint8_t* w, int part, const uint8_t* q, int64_t act_stride,
                               Words (&isum)[kRows]) {
    Words values[8];
    unpack<F, 0>(w, 0, part, values);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m, q += act_stride) isum[m] = dot16(dot16(isum[m], values, q), values + 4, q + 16);
  }

  template <typename F, int i, int kRows>
  EDGE_INLINE static void run(const uint8_t* w, int u, int part, const uint8_t* q, int64_t act_stride, Words scale,
                              Words (&isum)[kRows]) {
    Words values[8];
    unpack<F, i>(w, u, part, values);
    const Words scale0 = Base::low_of_pair(scale), scale1 = Base::high_of_pair(scale);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m, q += act_stride) {
      const Words first = dot16(Base::zero(), values, q);
      if constexpr (16 * F::kMaxQuant * 127 <= 32767) {
        // Both dots fit int16: one instruction scales and adds the two.
        const Words second = dot16(Base::zero(), values + 4, q + 16);
        isum[m] = Base::dot_pairs(isum[m], scale, Base::pair(first, second));
      } else if constexpr (F::kGroup == 32) {
        isum[m] = Base::add(isum[m], Base::multiply(scale1, dot16(first, values + 4, q + 16)));
      } else {
        const Words second = dot16(Base::zero(), values + 4, q + 16);
        isum[m] = Base::add(isum[m], Base::multiply(scale0, first));
        isum[m] = Base::add(isum[m], Base::multiply(scale1, second));
      }
    }
  }
};

}  // namespace
}  // namespace edge
