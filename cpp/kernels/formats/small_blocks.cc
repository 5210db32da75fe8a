// Plain floats, and blocks of 32 values under one scale or 64 under four (NVFP4). The low nibbles hold the first half
// of the values under a scale.
#include <cstring>

#include "kernels/formats/decoders.h"
#include "kernels/formats/float_bits.h"

namespace edge {
namespace {

// Unsigned E4M3 (bias 7) halved. 0x7f is no number and counts as zero; the sign bit is not looked at otherwise.
float ue4m3_half(uint8_t x) {
  if (x == 0x7f) return 0.0f;
  const int exponent = (x >> 3) & 15;
  const auto mantissa = static_cast<float>(x & 7);
  if (exponent == 0) return mantissa * 0x1p-10f;
  return (1.0f + mantissa / 8.0f) * std::bit_cast<float>(static_cast<uint32_t>(exponent - 8 + 127) << 23);
}

// Bit j of `high` becomes the fifth bit of value j.
inline int five_bits(uint8_t nibble, uint32_t high, int j) { return nibble | static_cast<int>((high >> j) & 1) << 4; }

}  // namespace

void decode_f32(const std::byte* blocks, int64_t n_blocks, float* out) {
  std::memcpy(out, blocks, static_cast<size_t>(n_blocks) * sizeof(float));
}

void decode_f16(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (int64_t i = 0; i < n_blocks; ++i) out[i] = load_half(blocks + 2 * i);
}

void decode_bf16(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (int64_t i = 0; i < n_blocks; ++i) out[i] = bfloat_to_float(load<uint16_t>(blocks + 2 * i));
}

void decode_q4_0(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 18, out += 32) {
    const float d = load_half(block);
    for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>((block[2 + j] & 15) - 8);
    for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>((block[2 + j] >> 4) - 8);
  }
}

void decode_q4_1(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 20, out += 32) {
    const float d = load_half(block), m = load_half(block + 2);
    for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>(block[4 + j] & 15) + m;
    for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>(block[4 + j] >> 4) + m;
  }
}

void decode_q5_0(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 22, out += 32) {
    const float d = load_half(block);
    const auto high = load<uint32_t>(block + 2);
    const uint8_t* q = block + 6;
    for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>(five_bits(q[j] & 15, high, j) - 16);
    for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>(five_bits(q[j] >> 4, high, 16 + j) - 16);
  }
}

void decode_q5_1(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 24, out += 32) {
    const float d = load_half(block), m = load_half(block + 2);
    const auto high = load<uint32_t>(block + 4);
    const uint8_t* q = block + 8;
    for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>(five_bits(q[j] & 15, high, j)) + m;
    for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>(five_bits(q[j] >> 4, high, 16 + j)) + m;
  }
}

void decode_q8_0(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 34, out += 32) {
    const float d = load_half(block);
    for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(block[2 + j]));
  }
}

void decode_iq4_nl(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 18, out += 32) {
    const float d = load_half(block);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>(kIq4Steps[block[2 + j] & 15]);
      out[16 + j] = d * static_cast<float>(kIq4Steps[block[2 + j] >> 4]);
    }
  }
}

void decode_mxfp4(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 17, out += 32) {
    const float d = e8m0_half(block[0]);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * static_cast<float>(kE2m1Doubled[block[1 + j] & 15]);
      out[16 + j] = d * static_cast<float>(kE2m1Doubled[block[1 + j] >> 4]);
    }
  }
}

void decode_nvfp4(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 36, out += 64) {
    for (int sub = 0; sub < 4; ++sub) {
      const float d = ue4m3_half(block[sub]);
      const uint8_t* q = block + 4 + 8 * sub;
      for (int j = 0; j < 8; ++j) {
        out[16 * sub + j] = d * static_cast<float>(kE2m1Doubled[q[j] & 15]);
        out[16 * sub + 8 + j] = d * static_cast<float>(kE2m1Doubled[q[j] >> 4]);
      }
    }
  }
}

}  // namespace edge
