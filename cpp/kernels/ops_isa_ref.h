// Floats and halves of any machine: plain vector code, and f16 conversion spelled out in bits.
#pragma once

#include <cstdint>

namespace edge {
namespace {

struct RefIsa {
  static constexpr int kLanes = 4;
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t IVec __attribute__((vector_size(16)));
  static constexpr int kScoreHeads = 2;
  static constexpr int kValueHeads = 2;
  static constexpr int kValueChunks = 1;
  static constexpr int kValueSums = 2;

  static Vec from_f16(const uint16_t* p) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    const IVec h = __builtin_convertvector(halves, IVec);
    const IVec magnitude = h & 0x7fff;
    // Normal: rebias the exponent by 127 - 15. Inf and NaN: all ones, NaN made quiet.
    IVec bits = (magnitude << 13) + (112 << 23);
    bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : bits;
    bits = magnitude > 0x7c00 ? bits | 0x00400000 : bits;
    // Subnormal: 2^-14 * (1 + m / 1024) minus 2^-14 is exact.
    const IVec with_one = (magnitude << 13) + (113 << 23);
    const Vec small = reinterpret_cast<Vec>(with_one) - 6.103515625e-05f;
    bits = magnitude < 0x0400 ? reinterpret_cast<IVec>(small) : bits;
    bits |= (h & 0x8000) << 16;
    return reinterpret_cast<Vec>(bits);
  }

  static uint16_t half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t h;
    if (magnitude > 0x7f800000) {
      h = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN: quiet, the upper payload kept
    } else if (magnitude >= 0x47800000) {
      h = 0x7c00;  // 65536 and above
    } else if (magnitude >= 0x38800000) {
      // Round to nearest even at bit 13; a carry runs into the exponent, up to inf.
      const uint32_t rebiased = magnitude - (112u << 23);
      h = (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13;
    } else {
      // Below 2^-14 the result counts units of 2^-24: 0.5 has that unit in its last place.
      float sum;
      __builtin_memcpy(&sum, &magnitude, sizeof sum);
      sum += 0.5f;
      uint32_t sum_bits;
      __builtin_memcpy(&sum_bits, &sum, sizeof sum_bits);
      h = sum_bits - 0x3f000000;
    }
    return static_cast<uint16_t>(sign | h);
  }

  static uint32_t bits(IVec on) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(on[i]) & 1u << i;
    return bits;
  }
  static void to_f16(Vec v, uint16_t* p) {
    for (int i = 0; i < kLanes; ++i) p[i] = half(v[i]);
  }
};

}  // namespace
}  // namespace edge
