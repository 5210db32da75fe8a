// Q4_K and Q6_K.
#include "kernels/gemv_dot_avx2.h"

namespace edge {
namespace {

// (a[r], b[r]) of 16 rows as int16 pairs: 8 rows in each of out[0], out[1].
template <bool kSigned>
inline void pair16(__m128i a, __m128i b, __m256i* out) {
  const __m128i low = _mm_unpacklo_epi8(a, b);
  const __m128i high = _mm_unpackhi_epi8(a, b);
  out[0] = kSigned ? _mm256_cvtepi8_epi16(low) : _mm256_cvtepu8_epi16(low);
  out[1] = kSigned ? _mm256_cvtepi8_epi16(high) : _mm256_cvtepu8_epi16(high);
}

struct Q4_K {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = 2304;

  // Scales and mins of the 8 sub-blocks, each twice as an int16 pair, so that vpmaddwd takes two sums at once.
  static inline void unpack_scales(const uint8_t* w, __m256i (&scale)[8][kHalves], __m256i (&min)[8][kHalves]) {
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
      pair16<false>(scale_even, scale_even, scale[2 * p]);
      pair16<false>(scale_odd, scale_odd, scale[2 * p + 1]);
      pair16<false>(min_even, min_even, min[2 * p]);
      pair16<false>(min_odd, min_odd, min[2 * p + 1]);
    }
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    const __m256i mask = _mm256_set1_epi8(15);
    Sums<kRows> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x256)) {
      __m256i scale[8][kHalves], min[8][kHalves];
      unpack_scales(w, scale, min);
      for (int h = 0; h < kHalves; ++h) {
        __m256i isum[kRows];
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) isum[m] = _mm256_setzero_si256();
        for (int p = 0; p < 4; ++p) {
          const uint8_t* q = w + 256 + 512 * p + 32 * h;
          prefetch<5>(w + 288 * (4 * h + p));
          __m256i low_pairs[kRows], high_pairs[kRows];  // at most 8 * 2 * 15 * 127 = 30480
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) low_pairs[m] = high_pairs[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
          for (int s = 0; s < 8; ++s) {
            const __m256i both = load(q + 64 * s);
            const __m256i low = _mm256_and_si256(both, mask);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m) {
              const int8_t* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride)->q + 64 * p + 4 * s;
              low_pairs[m] = _mm256_add_epi16(low_pairs[m], _mm256_maddubs_epi16(low, broadcast4(a)));
              high_pairs[m] = _mm256_add_epi16(high_pairs[m], _mm256_maddubs_epi16(high, broadcast4(a + 32)));
              pin(low_pairs[m]);
              pin(high_pairs[m]);
            }
          }
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) {
            const __m256i even = _mm256_madd_epi16(low_pairs[m], scale[2 * p][h]);
            const __m256i odd = _mm256_madd_epi16(high_pairs[m], scale[2 * p + 1][h]);
            isum[m] = _mm256_add_epi32(isum[m], _mm256_add_epi32(even, odd));
          }
        }
        const __m256 d = load_halves(w + 16 * h);
        const __m256 dmin = load_halves(w + 32 + 16 * h);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          __m256i msum = _mm256_setzero_si256();
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) {
            msum = _mm256_add_epi32(msum, _mm256_madd_epi16(min[j][h], broadcast4(a->sums + 2 * j)));
          }
          const __m256 acc = accumulate(isum[m], d, a->d, sums.acc[m][h]);
          const __m256 scaled = _mm256_mul_ps(dmin, _mm256_set1_ps(a->d));
          sums.acc[m][h] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(msum), scaled, acc);
        }
      }
    }
    sums.store(y, y_stride);
  }
};

struct Q6_K {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = 3360;

  // Adds scale * dot of sub-block 4u+i (two groups of 16) for 8 rows; q is unsigned here, 32 too large.
  template <int i, int kRows>
  static inline void sub_block(const uint8_t* w, int u, int h, const __m256i (&scale)[16][kHalves],
                               const uint8_t* acts, int64_t act_stride, __m256i (&isum)[kRows]) {
    const uint8_t* low = w + 288 + 512 * (2 * u + i / 2) + 32 * h;
    const uint8_t* high = w + 2336 + 512 * u + 32 * h;
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i top_mask = _mm256_set1_epi8(0x30);
    const int j = 4 * u + i;
#pragma GCC unroll 4
    for (int s = 0; s < 8; s += 2) {
      __m256i values[2];
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        __m256i nibble = load(low + 64 * (s + t));
        if constexpr (i % 2 == 1) nibble = _mm256_srli_epi16(nibble, 4);
        __m256i top = load(high + 64 * (s + t));
        if constexpr (i < 2) top = _mm256_slli_epi16(top, 4 - 2 * i);
        if constexpr (i == 3) top = _mm256_srli_epi16(top, 2);
        values[t] = _mm256_or_si256(_mm256_and_si256(nibble, mask), _mm256_and_si256(top, top_mask));
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const int8_t* q = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride)->q + 32 * j + 4 * s;
        // At most 2 * 2 * 63 * 127 = 32004.
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(values[0], broadcast4(q)),
                                               _mm256_maddubs_epi16(values[1], broadcast4(q + 4)));
        isum[m] = _mm256_add_epi32(isum[m], _mm256_madd_epi16(pairs, scale[2 * j + s / 4][h]));
        pin(isum[m]);
      }
    }
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<kRows> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x256)) {
      __m256i scale[16][kHalves];  // of a group, twice
      __m256i pairs[8][kHalves];   // of the two groups of a sub-block
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m128i first = load128(w + 32 + 32 * j);
        const __m128i second = load128(w + 48 + 32 * j);
        pair16<true>(first, first, scale[2 * j]);
        pair16<true>(second, second, scale[2 * j + 1]);
        pair16<true>(first, second, pairs[j]);
      }
      for (int h = 0; h < kHalves; ++h) {
        __m256i isum[kRows];
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          // Starts at -32 * sum of scale * activations: what the unsigned q carry too much.
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          __m256i excess = _mm256_setzero_si256();
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) {
            excess = _mm256_add_epi32(excess, _mm256_madd_epi16(pairs[j][h], broadcast4(a->sums + 2 * j)));
          }
          isum[m] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(excess, 5));
        }
        for (int u = 0; u < 2; ++u) {
          prefetch<14>(w + 840 * (2 * h + u));
          sub_block<0>(w, u, h, scale, acts, act_stride, isum);
          sub_block<1>(w, u, h, scale, acts, act_stride, isum);
          sub_block<2>(w, u, h, scale, acts, act_stride, isum);
          sub_block<3>(w, u, h, scale, acts, act_stride, isum);
        }
        const __m256 d = load_halves(w + 16 * h);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
          sums.acc[m][h] = accumulate(isum[m], d, a->d, sums.acc[m][h]);
        }
      }
    }
    sums.store(y, y_stride);
  }
};

}  // namespace

EDGE_GEMV(gemv_q4_k_avx2, run_tiles<Q4_K, kMaxRows>)
EDGE_GEMV(gemv_q6_k_avx2, run_tiles<Q6_K, kMaxRows>)

}  // namespace edge
