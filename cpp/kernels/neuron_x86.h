// What the AVX2 and AVX-512 neuron kernels share: eight floats in a ymm. Internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/neuron.h"

namespace edge {
namespace {

struct YmmLanes {
  using Lanes = __m256;
  static inline Lanes zero() { return _mm256_setzero_ps(); }
  static inline Lanes halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
  static inline Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
  static inline Lanes mul(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
  static inline float sum(Lanes a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static inline void scales(const uint8_t* p, float a, float* out) {
    _mm256_storeu_ps(out, mul(halves(p), _mm256_set1_ps(a)));
  }
};

}  // namespace
}  // namespace edge
