// Q8_0 and Q4_0.
#include "kernels/gemv_dot_avx2.h"

namespace edge {
namespace {

// Q8_0 and Q4_0. Dot::run<kRows>(q, acts, act_stride, isum) takes 32 values of K of all 16 rows, offset removed; both
// halves at once, so that one broadcast of activations serves both.
template <int64_t kBytes, typename Dot>
struct Block32 {
  static constexpr int64_t kBlockValues = 32;
  static constexpr int64_t kBlockBytes = kBytes;

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<kRows> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += kBytes, acts += sizeof(ActQ8x32)) {
      prefetch<(kBytes + 63) / 64>(w);
      __m256i isum[kRows][kHalves];
      Dot::template run<kRows>(w + 32, acts, act_stride, isum);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const auto* a = reinterpret_cast<const ActQ8x32*>(acts + m * act_stride);
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
          sums.acc[m][h] = accumulate(isum[m][h], load_halves(w + 16 * h), a->d, sums.acc[m][h]);
        }
      }
    }
    sums.store(y, y_stride);
  }
};

struct DotQ8_0 {
  template <int kRows>
  static inline void run(const uint8_t* q, const uint8_t* acts, int64_t act_stride,
                         __m256i (&isum)[kRows][kHalves]) {
    const __m256i sign_bit = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) isum[m][0] = isum[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      // |w| <= 128 and |a| <= 127: a pair is at most 2 * 128 * 127 = 32512. Unsigned w would reach 64770 and saturate.
      const __m256i w[kHalves] = {_mm256_xor_si256(load(q + 64 * s), sign_bit),
                                  _mm256_xor_si256(load(q + 64 * s + 32), sign_bit)};
      const __m256i magnitude[kHalves] = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const __m256i a = broadcast4(reinterpret_cast<const ActQ8x32*>(acts + m * act_stride)->q + 4 * s);
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
          const __m256i pairs = _mm256_maddubs_epi16(magnitude[h], _mm256_sign_epi8(a, w[h]));
          isum[m][h] = _mm256_add_epi32(isum[m][h], _mm256_madd_epi16(pairs, ones));
          pin(isum[m][h]);
        }
      }
    }
  }
};

struct DotQ4_0 {
  template <int kRows>
  static inline void run(const uint8_t* q, const uint8_t* acts, int64_t act_stride,
                         __m256i (&isum)[kRows][kHalves]) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i pairs[kRows][kHalves];  // at most 8 * 2 * 15 * 127 = 30480
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const __m256i both[kHalves] = {load(q + 64 * s), load(q + 64 * s + 32)};
#pragma GCC unroll 2
      for (int nibble = 0; nibble < 2; ++nibble) {
        const __m256i w[kHalves] = {_mm256_and_si256(_mm256_srli_epi16(both[0], 4 * nibble), mask),
                                    _mm256_and_si256(_mm256_srli_epi16(both[1], 4 * nibble), mask)};
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const auto* block = reinterpret_cast<const ActQ8x32*>(acts + m * act_stride);
          const __m256i a = broadcast4(block->q + 16 * nibble + 4 * s);
#pragma GCC unroll 2
          for (int h = 0; h < kHalves; ++h) {
            pairs[m][h] = _mm256_add_epi16(pairs[m][h], _mm256_maddubs_epi16(w[h], a));
            pin(pairs[m][h]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const auto* block = reinterpret_cast<const ActQ8x32*>(acts + m * act_stride);
      const __m256i offset = _mm256_slli_epi32(broadcast4(&block->sum), 3);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        isum[m][h] = _mm256_sub_epi32(_mm256_madd_epi16(pairs[m][h], _mm256_set1_epi16(1)), offset);
      }
    }
  }
};

using Q8_0 = Block32<544, DotQ8_0>;
using Q4_0 = Block32<288, DotQ4_0>;

}  // namespace

EDGE_GEMV(gemv_q8_0_avx2, run_tiles<Q8_0, kMaxRows>)
EDGE_GEMV(gemv_q4_0_avx2, run_tiles<Q4_0, kMaxRows>)

}  // namespace edge
