#include <immintrin.h>

#include "kernels/gemv_float.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx2);

namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 3;  // x 4 chains = 12 of 16 registers
  static constexpr int kPartVectors = 1;
  static constexpr int64_t kPrefetchBytes = 8192;

  static inline V load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
  static inline V set1(float x) { return _mm256_set1_ps(x); }
};

inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

struct F32 {
  static constexpr int64_t kBytes = 4;
  static inline __m256 load(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
struct F16 {
  static constexpr int64_t kBytes = 2;
  static inline __m256 load(const uint8_t* p) { return _mm256_cvtph_ps(load128(p)); }
};
struct BF16 {
  static constexpr int64_t kBytes = 2;
  static inline __m256 load(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
};

}  // namespace

EDGE_GEMV(gemv_f32_avx2, run_float_tiles<Avx2, F32>)
EDGE_GEMV(gemv_f16_avx2, run_float_tiles<Avx2, F16>)
EDGE_GEMV(gemv_bf16_avx2, run_float_tiles<Avx2, BF16>)

}  // namespace edge
