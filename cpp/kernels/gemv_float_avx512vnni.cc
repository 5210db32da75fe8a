#include <immintrin.h>

#include "kernels/gemv_float.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx512vnni);

namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 4;  // x 4 chains = 16 of 32 registers
  static constexpr int kPartVectors = 1;
  static constexpr int64_t kPrefetchBytes = 8192;

  static inline V load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
  static inline V set1(float x) { return _mm512_set1_ps(x); }
};

struct F32 {
  static constexpr int64_t kBytes = 4;
  static inline __m512 load(const uint8_t* p) { return _mm512_loadu_ps(p); }
};
struct F16 {
  static constexpr int64_t kBytes = 2;
  static inline __m512 load(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};
struct BF16 {
  static constexpr int64_t kBytes = 2;
  static inline __m512 load(const uint8_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};

}  // namespace

EDGE_GEMV(gemv_f32_avx512vnni, run_float_tiles<Avx512, F32>)
EDGE_GEMV(gemv_f16_avx512vnni, run_float_tiles<Avx512, F16>)
EDGE_GEMV(gemv_bf16_avx512vnni, run_float_tiles<Avx512, BF16>)

}  // namespace edge
