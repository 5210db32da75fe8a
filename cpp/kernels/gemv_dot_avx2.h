// Integer dot products for AVX2. One ymm holds 8 rows x 4 values of K. vpmaddubsw multiplies unsigned by signed bytes
// into int16 pairs and saturates; every use states why its sums fit.
// Internal linkage: only the _avx2 files include this, and each compiles its own copy.
#pragma once

#include <immintrin.h>

#include "kernels/gemv_driver.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx2);

namespace {

constexpr int kMaxRows = 4;
constexpr int kHalves = 2;  // of a tile: 8 rows each
// Bytes ahead of use: what one core has in flight at 40 GB/s and 200 ns. Hardware prefetchers stop at each 4 KiB page.
constexpr int64_t kPrefetchBytes = 8192;

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256 load_halves(const uint8_t* p) { return _mm256_cvtph_ps(load128(p)); }
// Four activation bytes (or two int16) for every row.
inline __m256i broadcast4(const void* p) {
  int32_t value;
  __builtin_memcpy(&value, p, 4);
  return _mm256_set1_epi32(value);
}
template <int kLines>
inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 16
  for (int i = 0; i < kLines; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + 64 * i), _MM_HINT_T0);
  }
}

// Keeps a running sum in its register: GCC would turn a chain of integer adds into a tree, and spill every leaf.
inline void pin(__m256i& v) { __asm__("" : "+x"(v)); }

// acc + isum * (d_w * d_a), rounded as the definition says.
inline __m256 accumulate(__m256i isum, __m256 d_w, float d_a, __m256 acc) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), _mm256_mul_ps(d_w, _mm256_set1_ps(d_a)), acc);
}

template <int kRows>
struct Sums {
  __m256 acc[kRows][kHalves];

  inline Sums() {
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
  }
  inline void store(float* y, int64_t y_stride) const {
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      _mm256_storeu_ps(y + m * y_stride, acc[m][0]);
      _mm256_storeu_ps(y + m * y_stride + 8, acc[m][1]);
    }
  }
};

}  // namespace
}  // namespace edge
