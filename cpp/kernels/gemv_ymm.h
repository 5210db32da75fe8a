// A ymm of 8 rows x 4 values of K: what the 256-bit ISAs share. Internal linkage: each includer compiles its own copy
// under its own flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/format.h"

namespace edge {
namespace {

struct Ymm {
  using Words = __m256i;
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kParts = 2;
  static constexpr int kMaxRows = 4;
  // Bytes ahead of use: what one core has in flight at 40 GB/s and 200 ns. Hardware prefetchers stop at each 4 KiB.
  static constexpr int64_t kPrefetchBytes = 8192;

  static inline __m128i load64(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static inline Words words(const uint8_t* p, int part) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * part));
  }
  static inline void put(uint8_t* p, int part, Words x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * part), x);
  }
  static inline Words halves(const uint8_t* p, int part) { return _mm256_cvtepu16_epi32(load128(p + 16 * part)); }
  static inline Words byte_pairs(const uint8_t* p, int part) {
    return spread<0, 0>(_mm256_cvtepu8_epi32(load64(p + 8 * part)));
  }
  static inline Words signed_pair(const uint8_t* a, const uint8_t* b, int part) {
    return pair(_mm256_cvtepi8_epi32(load64(a + 8 * part)), _mm256_cvtepi8_epi32(load64(b + 8 * part)));
  }
  static inline Floats float_halves(const uint8_t* p, int part) { return _mm256_cvtph_ps(load128(p + 16 * part)); }
  template <Scales kScales>
  static inline Floats row_scales(const uint8_t* w, int part) {
    if constexpr (kScales != Scales::kExponent) return float_halves(w, part);
    // 2^(x - 128); the two smallest are subnormal.
    const Words x = _mm256_cvtepu8_epi32(load64(w + 8 * part));
    const Words normal = _mm256_max_epi32(x, _mm256_set1_epi32(2));
    const Words bits = _mm256_slli_epi32(_mm256_sub_epi32(normal, _mm256_set1_epi32(1)), 23);
    return _mm256_castsi256_ps(_mm256_srlv_epi32(bits, _mm256_sub_epi32(normal, x)));
  }

  template <int n>
  static inline Words shift(Words x) {
    if constexpr (n > 0) return _mm256_srli_epi16(x, n);
    if constexpr (n < 0) return _mm256_slli_epi16(x, -n);
    return x;
  }
  static inline Words mask(Words x, uint32_t bits) {
    return _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(bits)));
  }
  template <int from, int n, int to = 0>
  static inline Words bits(Words x) {
    return _mm256_and_si256(shift<from - to>(x), _mm256_set1_epi8(((1 << n) - 1) << to));
  }
  static inline Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
  static inline Words lookup(const uint8_t (&table)[16], Words index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table)), index);
  }
  template <int a, int b>
  static inline Words spread(Words x) {
    constexpr auto kOrder = static_cast<int>(0x80008000u | b << 16 | a);  // 0x80 makes a zero byte
    return _mm256_shuffle_epi8(x, by_word(kOrder));
  }
  static inline Words less32(Words x) { return _mm256_sub_epi16(x, _mm256_set1_epi16(32)); }

  static inline Words zero() { return _mm256_setzero_si256(); }
  static inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
  static inline Words subtract(Words a, Words b) { return _mm256_sub_epi32(a, b); }
  static inline Words multiply(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
  template <int n>
  static inline Words times_power(Words x) {
    return _mm256_slli_epi32(x, n);
  }
  // Four activation bytes (or two int16) for every row.
  static inline Words broadcast4(const void* p) {
    int32_t value;
    __builtin_memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
  }
  static inline Words pair(Words low, Words high) {
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
  }
  static inline Words low_of_pair(Words x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 16), 16); }
  static inline Words high_of_pair(Words x) { return _mm256_srai_epi32(x, 16); }
  // One half of every pair of int16, twice.
  template <int which>
  static inline Words repeat(Words x) {
    return _mm256_shuffle_epi8(x, by_word(which == 0 ? 0x01000100 : 0x03020302));
  }

  static inline Floats zero_floats() { return _mm256_setzero_ps(); }
  static inline Floats load(const float* y) { return _mm256_loadu_ps(y); }
  static inline void store(float* y, Floats x) { _mm256_storeu_ps(y, x); }
  // acc +- isum * (d_w * d_a), rounded as the definition says.
  static inline Floats accumulate(Words isum, Floats d_w, float d_a, Floats acc) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), _mm256_mul_ps(d_w, _mm256_set1_ps(d_a)), acc);
  }
  static inline Floats reduce(Words isum, Floats d_w, float d_a, Floats acc) {
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(isum), _mm256_mul_ps(d_w, _mm256_set1_ps(d_a)), acc);
  }

 private:
  // A byte order within a word, for all four words of each 128 bits; a byte of 0x80 stays above 127.
  static inline Words by_word(int order) {
    const Words first = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm256_add_epi8(_mm256_set1_epi32(order), first);
  }
};

}  // namespace
}  // namespace edge
