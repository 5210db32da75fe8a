// f16 and bf16 by integer arithmetic: no ISA flag needed, no branch, so the compiler vectorises loops over them.
// Internal linkage: a copy compiled in a file with ISA flags must not be merged with the baseline one.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace edge {

static_assert(std::endian::native == std::endian::little, "blocks and tiles are little-endian");

template <typename T>
static inline T load(const void* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

template <typename T>
static inline void store(void* bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

// Exact. The exponent moves from bias 15 to 127; a subnormal becomes 2^-14 * (1 + m) - 2^-14.
static inline float half_to_float(uint16_t half) {
  constexpr uint32_t kRebias = 112u << 23;
  const uint32_t shifted = (half & 0x7fffu) << 13;
  const uint32_t exponent = shifted & (0x1fu << 23);
  const uint32_t normal = shifted + kRebias;
  const float subnormal = std::bit_cast<float>(shifted + (113u << 23)) - std::bit_cast<float>(113u << 23);
  uint32_t bits = exponent == 0 ? std::bit_cast<uint32_t>(subnormal) : normal;
  bits = exponent == (0x1fu << 23) ? normal + kRebias : bits;
  return std::bit_cast<float>(bits | (half & 0x8000u) << 16);
}

// Round to nearest even; beyond 65504 becomes infinite, NaN stays NaN.
static inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 leaves the ten bits of a subnormal half, rounded by the adder, at the end of the significand.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | (bits & 0x80000000u) >> 16);
}

static inline float bfloat_to_float(uint16_t bfloat) {
  return std::bit_cast<float>(static_cast<uint32_t>(bfloat) << 16);
}

// Round to nearest even; a NaN is made quiet, so that cutting its low bits cannot turn it into an infinity.
static inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static inline float load_half(const void* bytes) { return half_to_float(load<uint16_t>(bytes)); }

}  // namespace edge
