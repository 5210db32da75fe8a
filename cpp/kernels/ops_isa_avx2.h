// Floats and halves of AVX2.
// Internal linkage: compiled only into files with this ISA's flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace edge {
namespace {

struct Avx2Isa {
  static constexpr int kLanes = 8;
  typedef float Vec __attribute__((vector_size(32)));
  typedef int32_t IVec __attribute__((vector_size(32)));
  static constexpr int kScoreHeads = 2;
  static constexpr int kValueHeads = 2;
  static constexpr int kValueChunks = 2;
  static constexpr int kValueSums = 4;

  static Vec from_f16(const uint16_t* p) {
    return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
  }
  static uint32_t bits(IVec on) { return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(on))); }
  static void to_f16(Vec v, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace
}  // namespace edge
