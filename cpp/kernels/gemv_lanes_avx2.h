// AVX2: vpmaddubsw multiplies unsigned by signed bytes into int16 pairs and saturates, so a step takes as many words as
// fit. Internal linkage: only the _avx2 files include this.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "kernels/gemv_core.h"
#include "kernels/gemv_ymm.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx2);

namespace {

struct Lanes : Ymm {
  // Beyond 129 even one pair of products would saturate: then the values are taken as signed.
  template <typename F>
  static constexpr bool kSigned = 2 * F::kMaxQuant * 127 > 32767;

  // Keeps a running sum in its register: GCC would turn a chain of integer adds into a tree, and spill every leaf.
  static inline void pin(Words& v) { __asm__("" : "+x"(v)); }

  // isum[m] += multiplier * dot of words [first, first + n) of a run; the int16 multiplier comes twice.
  template <typename F, int i, int first, int n, int kRows>
  EDGE_INLINE static void step(const uint8_t* w, int u, int part, const uint8_t* q, int64_t act_stride,
                               Words multiplier, Words (&isum)[kRows]) {
    Words pairs[kRows];
    unroll<n>([&](auto at) EDGE_INLINE_BODY {
      constexpr int s = first + at;
      Words value = F::template quants<i, s>(w, u, part);
      Words magnitude = value;
      if constexpr (kSigned<F>) {
        static_assert(F::kOffset == 128);
        value = _mm256_xor_si256(value, _mm256_set1_epi8(static_cast<char>(0x80)));
        magnitude = _mm256_abs_epi8(value);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        Words a = broadcast4(q + m * act_stride + 4 * s);
        if constexpr (kSigned<F>) a = _mm256_sign_epi8(a, value);
        const Words products = _mm256_maddubs_epi16(magnitude, a);
        pairs[m] = at == 0 ? products : _mm256_add_epi16(pairs[m], products);
        pin(pairs[m]);
      }
    });
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      isum[m] = _mm256_add_epi32(isum[m], _mm256_madd_epi16(pairs[m], multiplier));
      pin(isum[m]);
    }
  }

  // Words [first, first + n), as many at a time as int16 holds.
  template <typename F, int i, int first, int n, int kRows>
  EDGE_INLINE static void steps(const uint8_t* w, int u, int part, const uint8_t* q, int64_t act_stride,
                                Words multiplier, Words (&isum)[kRows]) {
    constexpr int kWords = std::clamp(static_cast<int>(std::bit_floor(32767u / (2 * F::kMaxQuant * 127))), 1, n);
    unroll<n / kWords>([&](auto at) EDGE_INLINE_BODY {
      step<F, i, first + kWords * at, kWords>(w, u, part, q, act_stride, multiplier, isum);
    });
  }

  template <typename F, int kRows>
  EDGE_INLINE static void dots(const uint8_t* w, int part, const uint8_t* q, int64_t act_stride,
                               Words (&isum)[kRows]) {
    steps<F, 0, 0, 8>(w, 0, part, q, act_stride, _mm256_set1_epi16(1), isum);
  }

  template <typename F, int i, int kRows>
  EDGE_INLINE static void run(const uint8_t* w, int u, int part, const uint8_t* q, int64_t act_stride, Words scale,
                              Words (&isum)[kRows]) {
    if constexpr (F::kGroup == 32) {
      steps<F, i, 0, 8>(w, u, part, q, act_stride, scale, isum);
    } else {
      steps<F, i, 0, 4>(w, u, part, q, act_stride, repeat<0>(scale), isum);
      steps<F, i, 4, 4>(w, u, part, q, act_stride, repeat<1>(scale), isum);
    }
  }

  // The longest way there is: a format of few bits adds several products before it widens them.
  static inline Words multiply_add(Words sum, Words a, Words b) { return dot_pairs(sum, _mm256_maddubs_epi16(a, b), a); }

  static inline Words dot_pairs(Words sum, Words a, Words b) { return add(sum, _mm256_madd_epi16(a, b)); }
};

}  // namespace
}  // namespace edge
