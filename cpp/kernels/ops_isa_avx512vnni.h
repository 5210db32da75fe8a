// Floats and halves of AVX-512.
// Internal linkage: compiled only into files with this ISA's flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace edge {
namespace {

struct Avx512Isa {
  static constexpr int kLanes = 16;
  // The maskz forms, all lanes on: gcc 12 warns of its own undefined operand in the plain ones.
  typedef float Vec __attribute__((vector_size(64)));
  typedef int32_t IVec __attribute__((vector_size(64)));
  static constexpr int kScoreHeads = 4;
  static constexpr int kValueHeads = 8;
  static constexpr int kValueChunks = 4;
  static constexpr int kValueSums = 16;

  static Vec from_f16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p));
    return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, halves));
  }
  static uint32_t bits(IVec on) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(on)); }
  static void to_f16(Vec v, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec load_first(const float* p, int64_t n, float fill) {
    return reinterpret_cast<Vec>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p));
  }
  static void store_first(float* p, int64_t n, Vec v) { _mm512_mask_storeu_ps(p, first(n), reinterpret_cast<__m512>(v)); }
};

}  // namespace
}  // namespace edge
