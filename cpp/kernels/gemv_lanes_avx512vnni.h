// AVX-512: one zmm holds 16 rows x 4 values of K, so a tile is one vector wide, a row never leaves its lane and nothing
// is shuffled. Internal linkage: only the _avx512vnni files include this.
#pragma once

#include <immintrin.h>

#include "kernels/gemv_lanes_vnni.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx512vnni);

namespace {

struct Zmm {
  using Words = __m512i;
  using Floats = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kParts = 1;
  static constexpr int kMaxRows = 8;  // 16 would spill: a second pass over the tile, from L2, costs less
  // Bytes ahead of use: what one core has in flight at 40 GB/s and 200 ns. Hardware prefetchers stop at each 4 KiB.
  static constexpr int64_t kPrefetchBytes = 8192;

  static inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static inline __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static inline Words words(const uint8_t* p, int) { return _mm512_loadu_si512(p); }
  static inline void put(uint8_t* p, int, Words x) { _mm512_storeu_si512(p, x); }
  static inline Words halves(const uint8_t* p, int) { return _mm512_cvtepu16_epi32(load256(p)); }
  static inline Words byte_pairs(const uint8_t* p, int) {
    return spread<0, 0>(_mm512_cvtepu8_epi32(load128(p)));
  }
  static inline Words signed_pair(const uint8_t* a, const uint8_t* b, int) {
    return pair(_mm512_cvtepi8_epi32(load128(a)), _mm512_cvtepi8_epi32(load128(b)));
  }
  static inline Floats float_halves(const uint8_t* p, int) { return _mm512_cvtph_ps(load256(p)); }
  template <Scales kScales>
  static inline Floats row_scales(const uint8_t* w, int part) {
    if constexpr (kScales != Scales::kExponent) return float_halves(w, part);
    // 2^(x - 128); the two smallest are subnormal.
    const Words x = _mm512_cvtepu8_epi32(load128(w));
    const Words normal = _mm512_max_epi32(x, _mm512_set1_epi32(2));
    const Words bits = _mm512_slli_epi32(_mm512_sub_epi32(normal, _mm512_set1_epi32(1)), 23);
    return _mm512_castsi512_ps(_mm512_srlv_epi32(bits, _mm512_sub_epi32(normal, x)));
  }

  template <int n>
  static inline Words shift(Words x) {
    if constexpr (n > 0) return _mm512_srli_epi16(x, n);
    if constexpr (n < 0) return _mm512_slli_epi16(x, -n);
    return x;
  }
  static inline Words mask(Words x, uint32_t bits) {
    return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(bits)));
  }
  template <int from, int n, int to = 0>
  static inline Words bits(Words x) {
    return _mm512_and_si512(shift<from - to>(x), _mm512_set1_epi8(((1 << n) - 1) << to));
  }
  static inline Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
  static inline Words lookup(const uint8_t (&table)[16], Words index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(table)), index);
  }
  template <int a, int b>
  static inline Words spread(Words x) {
    constexpr auto kOrder = static_cast<int>(0x80008000u | b << 16 | a);  // 0x80 makes a zero byte
    const __m128i order = _mm_add_epi32(_mm_set1_epi32(kOrder), _mm_set_epi32(0xc000c, 0x80008, 0x40004, 0));
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(order));
  }
  static inline Words less32(Words x) { return _mm512_sub_epi16(x, _mm512_set1_epi16(32)); }

  static inline Words zero() { return _mm512_setzero_si512(); }
  static inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
  static inline Words subtract(Words a, Words b) { return _mm512_sub_epi32(a, b); }
  static inline Words multiply(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
  template <int n>
  static inline Words times_power(Words x) {
    return _mm512_slli_epi32(x, n);
  }
  // Four activation bytes (or two int16) for every row.
  static inline Words broadcast4(const void* p) {
    int32_t value;
    __builtin_memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
  }
  static inline Words dot4(Words sum, Words values, Words acts) { return _mm512_dpbusd_epi32(sum, values, acts); }
  static inline Words dot_pairs(Words sum, Words a, Words b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static inline Words pair(Words low, Words high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16));
  }
  static inline Words low_of_pair(Words x) { return _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16); }
  static inline Words high_of_pair(Words x) { return _mm512_srai_epi32(x, 16); }

  static inline Floats zero_floats() { return _mm512_setzero_ps(); }
  static inline Floats load(const float* y) { return _mm512_loadu_ps(y); }
  static inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x); }
  // acc +- isum * (d_w * d_a), rounded as the definition says.
  static inline Floats accumulate(Words isum, Floats d_w, float d_a, Floats acc) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(isum), _mm512_mul_ps(d_w, _mm512_set1_ps(d_a)), acc);
  }
  static inline Floats reduce(Words isum, Floats d_w, float d_a, Floats acc) {
    return _mm512_fnmadd_ps(_mm512_cvtepi32_ps(isum), _mm512_mul_ps(d_w, _mm512_set1_ps(d_a)), acc);
  }
};

using Lanes = Vnni<Zmm>;

}  // namespace
}  // namespace edge
