#include "kernels/gemv_table.h"
#include "kernels/neuron_act.h"
#include "kernels/neuron_driver.h"
#include "kernels/neuron_table.h"
#include "kernels/neuron_x86.h"
#include "kernels/neuron_zmm.h"

namespace edge {

EDGE_DECLARE_NEURON_TABLE(avx512vnni);
QuantizeQ8x32 quantize_q8x32_avx512vnni;

namespace {

struct Avx512 : YmmLanes {
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

#define EDGE_NEURON_ZMM(format, nibbles)                                                                           \
  void neuron_dot_##format##_avx512vnni(const std::byte* const* rows, int64_t n, int64_t hidden,                    \
                                        const std::byte* acts, int64_t act_stride, int64_t n_x, float* out,         \
                                        int64_t out_stride) {                                                       \
    ZmmDot<nibbles>::run(rows, n, hidden, acts, act_stride, n_x, out, out_stride);                                  \
  }
EDGE_NEURON_ZMM(q8, false)
EDGE_NEURON_ZMM(q4, true)
EDGE_NEURON_SHARED(avx512vnni, Avx512)

}  // namespace edge
