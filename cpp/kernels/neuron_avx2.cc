// vpmaddubsw multiplies unsigned by signed bytes into int16 pairs and saturates; each use states why its sums fit.
#include "kernels/gemv_table.h"
#include "kernels/neuron_act.h"
#include "kernels/neuron_driver.h"
#include "kernels/neuron_table.h"
#include "kernels/neuron_x86.h"

namespace edge {

EDGE_DECLARE_NEURON_TABLE(avx2);
QuantizeQ8x32 quantize_q8x32_avx2;

namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

struct Avx2 : YmmLanes {
  struct Quants {
    __m256i q[8];
  };
  static inline Quants bytes(const uint8_t* p) {
    Quants quants;
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) quants.q[s] = _mm256_xor_si256(load256(p + 32 * s), _mm256_set1_epi8(-128));
    return quants;
  }
  static inline Quants nibbles(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15);
    Quants quants;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const __m256i pair = load256(p + 32 * s);
      quants.q[s] = _mm256_and_si256(pair, mask);
      quants.q[4 + s] = _mm256_and_si256(_mm256_srli_epi16(pair, 4), mask);
    }
    return quants;
  }
  // |w| <= 128 and |a| <= 127: a pair is at most 2 * 128 * 127 = 32512. Unsigned w would reach 64770 and saturate.
  static inline Lanes dot_bytes(const Quants& w, const NeuronActGroup& act) {
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      const __m256i a = _mm256_sign_epi8(load256(act.q + 32 * s), w.q[s]);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.q[s]), a);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return _mm256_cvtepi32_ps(sum);
  }
  // int16 sums are at most 8 * 2 * 15 * 127 = 30480.
  static inline Lanes dot_nibbles(const Quants& w, const NeuronActGroup& act) {
    __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.q[s], load256(act.q + 32 * s)));
    }
    const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_slli_epi32(load256(act.sum), 3)));
  }

  using V = __m256;
  static constexpr int kWidth = 8;
  static inline V load_v(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store_v(float* p, V v) { _mm256_storeu_ps(p, v); }
  static inline V add_v(V a, V b) { return _mm256_add_ps(a, b); }
  static inline V scaled(__m128i bytes, __m256 scale) {  // the low eight, signed
    return _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
  }
  static inline void column_f16(const uint8_t* p, float scale, V (&out)[4]) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) out[v] = _mm256_mul_ps(_mm256_set1_ps(scale), halves(p + 16 * v));
  }
  static inline void column_q8(const uint8_t* p, float scale, V (&out)[4]) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      out[v] = scaled(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * v)), _mm256_set1_ps(scale));
    }
  }
  static inline void column_q4(const uint8_t* p, float scale, V (&out)[4]) {
    const __m128i pair = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i low = _mm_sub_epi8(_mm_and_si128(pair, mask), eight);
    const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(pair, 4), mask), eight);
    const __m256 scales = _mm256_set1_ps(scale);
    out[0] = scaled(low, scales);
    out[1] = scaled(_mm_srli_si128(low, 8), scales);
    out[2] = scaled(high, scales);
    out[3] = scaled(_mm_srli_si128(high, 8), scales);
  }
};

}  // namespace

EDGE_NEURON_KERNELS(avx2, Avx2)

}  // namespace edge
