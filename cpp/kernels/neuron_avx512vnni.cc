#include "kernels/gemv_table.h"
#include "kernels/neuron_act.h"
#include "kernels/neuron_driver.h"
#include "kernels/neuron_table.h"
#include "kernels/neuron_x86.h"

namespace edge {

EDGE_DECLARE_NEURON_TABLE(avx512vnni);
QuantizeQ8x32 quantize_q8x32_avx512vnni;

namespace {

struct Avx512 : YmmLanes {
  // A zmm holds two steps s, s + 1 of the eight lanes.
  struct Quants {
    __m512i q[4];
  };
  static inline Quants bytes(const uint8_t* p) {
    Quants quants;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) quants.q[s] = _mm512_loadu_si512(p + 64 * s);
    return quants;
  }
  static inline Quants nibbles(const uint8_t* p) {
    const __m512i mask = _mm512_set1_epi8(15);
    Quants quants;
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const __m512i pair = _mm512_loadu_si512(p + 64 * s);
      quants.q[s] = _mm512_and_si512(pair, mask);
      quants.q[2 + s] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask);
    }
    return quants;
  }
  template <int kOffsetBits>
  static inline Lanes dot(const Quants& w, const NeuronActGroup& act) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sum = _mm512_dpbusd_epi32(sum, w.q[s], _mm512_loadu_si512(act.q + 64 * s));
    const __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti32x8_epi32(sum, 1));
    const __m256i offset = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(act.sum)), kOffsetBits);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(both, offset));
  }
  static inline Lanes dot_bytes(const Quants& w, const NeuronActGroup& act) { return dot<7>(w, act); }
  static inline Lanes dot_nibbles(const Quants& w, const NeuronActGroup& act) { return dot<3>(w, act); }

  using V = __m512;
  static constexpr int kWidth = 16;
  static inline V load_v(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store_v(float* p, V v) { _mm512_storeu_ps(p, v); }
  static inline V add_v(V a, V b) { return _mm512_add_ps(a, b); }
  static inline void column_f16(const uint8_t* p, float scale, V (&out)[2]) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * v));
      out[v] = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtph_ps(half));
    }
  }
  static inline void column_q8(const uint8_t* p, float scale, V (&out)[2]) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * v)));
      out[v] = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(q));
    }
  }
  // A nibble has sixteen products: vpermps looks them up by the low four bits of each element.
  static inline void column_q4(const uint8_t* p, float scale, V (&out)[2]) {
    const __m512 steps = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512 table = _mm512_mul_ps(_mm512_set1_ps(scale), steps);
    const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    out[0] = _mm512_permutexvar_ps(pair, table);
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), table);
  }
};

}  // namespace

EDGE_NEURON_KERNELS(avx512vnni, Avx512)

}  // namespace edge
