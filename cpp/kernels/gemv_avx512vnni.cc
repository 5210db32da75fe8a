// Integer dot products for AVX-512-VNNI. One zmm holds 16 rows x 4 values of K; vpdpbusd multiplies it by one
// activation group broadcast to all rows, so a row never leaves its lane and nothing is shuffled.
#include <immintrin.h>

#include "kernels/gemv_driver.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx512vnni);

namespace {

constexpr int kMaxRows = 8;
// Bytes ahead of use: what one core has in flight at 40 GB/s and 200 ns. Hardware prefetchers stop at each 4 KiB page.
constexpr int64_t kPrefetchBytes = 8192;

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Four activation bytes (or two int16) for every row.
inline __m512i broadcast4(const void* p) {
  int32_t value;
  __builtin_memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
}
template <int kLines>
inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 16
  for (int i = 0; i < kLines; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + 64 * i), _MM_HINT_T0);
  }
}

// sum over 8 groups of four values.
inline __m512i dot32(const __m512i (&w)[8], const int8_t* q) {
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) sum = _mm512_dpbusd_epi32(sum, w[s], broadcast4(q + 4 * s));
  return sum;
}

// acc + isum * (d_w * d_a), rounded as the definition says.
inline __m512 accumulate(__m512i isum, __m512 d_w, float d_a, __m512 acc) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(isum), _mm512_mul_ps(d_w, _mm512_set1_ps(d_a)), acc);
}

template <int kRows>
inline void store(const __m512 (&acc)[kRows], float* y, int64_t y_stride) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(y + m * y_stride, acc[m]);
}

// Q8_0 and Q4_0 differ in how 32 values of K become unsigned bytes, and in the offset those carry.
template <int64_t kBytes, int kOffsetBits, auto kUnpack>
struct Block32 {
  static constexpr int64_t kBlockValues = 32;
  static constexpr int64_t kBlockBytes = kBytes;

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    __m512 acc[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; ++b, w += kBytes, acts += sizeof(ActQ8x32)) {
      prefetch<(kBytes + 63) / 64>(w);
      const __m512 d = load_halves(w);
      __m512i values[8];
      kUnpack(w + 32, values);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto* a = reinterpret_cast<const ActQ8x32*>(acts + m * act_stride);
        const __m512i offset = _mm512_slli_epi32(broadcast4(&a->sum), kOffsetBits);
        acc[m] = accumulate(_mm512_sub_epi32(dot32(values, a->q), offset), d, a->d, acc[m]);
      }
    }
    store(acc, y, y_stride);
  }
};

inline void unpack_q8_0(const uint8_t* q, __m512i (&values)[8]) {
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) values[s] = load(q + 64 * s);
}

inline void unpack_q4_0(const uint8_t* q, __m512i (&values)[8]) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const __m512i pair = load(q + 64 * s);
    values[s] = _mm512_and_si512(pair, mask);
    values[4 + s] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask);
  }
}

using Q8_0 = Block32<544, 7, unpack_q8_0>;
using Q4_0 = Block32<288, 3, unpack_q4_0>;

// (a[r], b[r]) as int16 pairs, one pair per row.
template <bool kSigned>
inline __m512i pair16(__m128i a, __m128i b) {
  const __m256i bytes = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
  return kSigned ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes);
}

inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

struct Q4_K {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = 2304;

  // Scales of 8 sub-blocks as int32, mins twice as int16 pairs (the activation sums come per 16 values).
  static inline void unpack_scales(const uint8_t* w, __m512i (&scale)[8], __m512i (&min)[8]) {
    const __m128i low4 = _mm_set1_epi8(0x0f);
    const __m128i high2 = _mm_set1_epi8(0x30);
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const __m128i even = load128(w + 64 + 32 * p);
      const __m128i odd = load128(w + 64 + 32 * p + 16);
      const __m128i top = load128(w + 192 + 16 * p);
      const __m128i scale_even = _mm_or_si128(_mm_and_si128(even, low4), _mm_and_si128(_mm_slli_epi16(top, 4), high2));
      const __m128i scale_odd = _mm_or_si128(_mm_and_si128(odd, low4), _mm_and_si128(top, high2));
      const __m128i min_even = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(even, 4), low4),
                                            _mm_and_si128(_mm_slli_epi16(top, 2), high2));
      const __m128i min_odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(odd, 4), low4),
                                           _mm_and_si128(_mm_srli_epi16(top, 2), high2));
      scale[2 * p] = _mm512_cvtepu8_epi32(scale_even);
      scale[2 * p + 1] = _mm512_cvtepu8_epi32(scale_odd);
      min[2 * p] = pair16<false>(min_even, min_even);
      min[2 * p + 1] = pair16<false>(min_odd, min_odd);
    }
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 acc[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x256)) {
      __m512i scale[8], min[8];
      unpack_scales(w, scale, min);
      __m512i isum[kRows];
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) isum[m] = _mm512_setzero_si512();
      for (int p = 0; p < 4; ++p) {
        const uint8_t* q = w + 256 + 512 * p;
        prefetch<9>(w + 576 * p);
        __m512i values[8];
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) values[s] = _mm512_and_si512(load(q + 64 * s), mask);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          isum[m] = _mm512_add_epi32(isum[m], _mm512_mullo_epi32(scale[2 * p], dot32(values, a->q + 64 * p)));
        }
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) values[s] = _mm512_and_si512(_mm512_srli_epi16(load(q + 64 * s), 4), mask);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          isum[m] = _mm512_add_epi32(isum[m], _mm512_mullo_epi32(scale[2 * p + 1], dot32(values, a->q + 64 * p + 32)));
        }
      }
      const __m512 d = load_halves(w);
      const __m512 dmin = load_halves(w + 32);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
        __m512i msum = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) msum = _mm512_dpwssd_epi32(msum, min[j], broadcast4(a->sums + 2 * j));
        acc[m] = accumulate(isum[m], d, a->d, acc[m]);
        acc[m] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(msum), _mm512_mul_ps(dmin, _mm512_set1_ps(a->d)), acc[m]);
      }
    }
    store(acc, y, y_stride);
  }
};

struct Q6_K {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = 3360;

  // Adds scale * dot of sub-block 4u+i (two groups of 16) for every row; q is unsigned here, 32 too large.
  template <int i, int kRows>
  static inline void sub_block(const uint8_t* w, int u, const __m512i (&pairs)[8], const uint8_t* acts,
                               int64_t act_stride, __m512i (&isum)[kRows]) {
    const uint8_t* low = w + 288 + 512 * (2 * u + i / 2);
    const uint8_t* high = w + 2336 + 512 * u;
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i top_mask = _mm512_set1_epi8(0x30);
    __m512i values[8];
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      __m512i nibble = load(low + 64 * s);
      if constexpr (i % 2 == 1) nibble = _mm512_srli_epi16(nibble, 4);
      nibble = _mm512_and_si512(nibble, mask);
      __m512i top = load(high + 64 * s);
      if constexpr (i < 2) top = _mm512_slli_epi16(top, 4 - 2 * i);
      if constexpr (i == 3) top = _mm512_srli_epi16(top, 2);
      values[s] = _mm512_ternarylogic_epi32(top, top_mask, nibble, 0xea);  // (top & mask) | nibble
    }
    const int j = 4 * u + i;
    const __m512i scale0 = _mm512_srai_epi32(_mm512_slli_epi32(pairs[j], 16), 16);
    const __m512i scale1 = _mm512_srai_epi32(pairs[j], 16);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const int8_t* q = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride)->q + 32 * j;
      __m512i dot0 = _mm512_setzero_si512();
      __m512i dot1 = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        dot0 = _mm512_dpbusd_epi32(dot0, values[s], broadcast4(q + 4 * s));
        dot1 = _mm512_dpbusd_epi32(dot1, values[4 + s], broadcast4(q + 16 + 4 * s));
      }
      isum[m] = _mm512_add_epi32(isum[m], _mm512_mullo_epi32(scale0, dot0));
      isum[m] = _mm512_add_epi32(isum[m], _mm512_mullo_epi32(scale1, dot1));
    }
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    __m512 acc[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x256)) {
      __m512i pairs[8];  // the two int8 scales of a sub-block, as int16
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) pairs[j] = pair16<true>(load128(w + 32 + 32 * j), load128(w + 48 + 32 * j));
      __m512i isum[kRows];
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        // Starts at -32 * sum of scale * activations: what the unsigned q carry too much.
        const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
        __m512i excess = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) excess = _mm512_dpwssd_epi32(excess, pairs[j], broadcast4(a->sums + 2 * j));
        isum[m] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(excess, 5));
      }
      for (int u = 0; u < 2; ++u) {
        prefetch<14>(w + 1680 * u);
        sub_block<0>(w, u, pairs, acts, act_stride, isum);
        sub_block<1>(w, u, pairs, acts, act_stride, isum);
        prefetch<13>(w + 1680 * u + 14 * 64);
        sub_block<2>(w, u, pairs, acts, act_stride, isum);
        sub_block<3>(w, u, pairs, acts, act_stride, isum);
      }
      const __m512 d = load_halves(w);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
        acc[m] = accumulate(isum[m], d, a->d, acc[m]);
      }
    }
    store(acc, y, y_stride);
  }
};

}  // namespace

EDGE_GEMV(gemv_q8_0_avx512vnni, run_tiles<Q8_0, kMaxRows>)
EDGE_GEMV(gemv_q4_0_avx512vnni, run_tiles<Q4_0, kMaxRows>)
EDGE_GEMV(gemv_q4_k_avx512vnni, run_tiles<Q4_K, kMaxRows>)
EDGE_GEMV(gemv_q6_k_avx512vnni, run_tiles<Q6_K, kMaxRows>)

}  // namespace edge
