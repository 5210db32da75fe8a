// The decoders behind the table in block.cc, by family.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace edge {

#define EDGE_DECODER(name) void decode_##name(const std::byte* blocks, int64_t n_blocks, float* out)

// small_blocks.cc: plain floats and blocks of 32 or 64 values under one scale.
EDGE_DECODER(f32);
EDGE_DECODER(f16);
EDGE_DECODER(bf16);
EDGE_DECODER(q4_0);
EDGE_DECODER(q4_1);
EDGE_DECODER(q5_0);
EDGE_DECODER(q5_1);
EDGE_DECODER(q8_0);
EDGE_DECODER(iq4_nl);
EDGE_DECODER(mxfp4);
EDGE_DECODER(nvfp4);

// k_quants.cc: 256 values, scales of their own for every 16 or 32.
EDGE_DECODER(q2_k);
EDGE_DECODER(q3_k);
EDGE_DECODER(q4_k);
EDGE_DECODER(q5_k);
EDGE_DECODER(q6_k);
EDGE_DECODER(iq4_xs);

// ternary.cc: -1, 0, 1 under one scale.
EDGE_DECODER(tq1_0);
EDGE_DECODER(tq2_0);

// codebooks.cc: vectors of 4 or 8 values looked up in a grid.
EDGE_DECODER(iq1_s);
EDGE_DECODER(iq1_m);
EDGE_DECODER(iq2_xxs);
EDGE_DECODER(iq2_xs);
EDGE_DECODER(iq2_s);
EDGE_DECODER(iq3_xxs);
EDGE_DECODER(iq3_s);

#undef EDGE_DECODER

// The 16 steps of IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl).
inline constexpr int8_t kIq4Steps[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// E2M1 doubled, so that all are whole; the scales carry the factor 0.5 (OCP Microscaling Formats v1.0, 5.3.3).
inline constexpr int8_t kE2m1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(x - 128): E8M0 (bias 127) halved. The two smallest are subnormal floats.
static inline float e8m0_half(uint8_t x) {
  return std::bit_cast<float>(x < 2 ? 0x00200000u << x : static_cast<uint32_t>(x - 1) << 23);
}

// The six-bit scales and mins of Q4_K and Q5_K: bytes 0-3 hold scales 0-3, bytes 4-7 mins 0-3, bytes 8-11 the low
// nibbles of scales and mins 4-7, whose top two bits lie above those of 0-3.
static inline void unpack_scales_and_mins(const uint8_t* packed, uint8_t* scales, uint8_t* mins) {
  for (int j = 0; j < 4; ++j) {
    const uint8_t scale = packed[j], min = packed[4 + j], low = packed[8 + j];
    scales[j] = scale & 63;
    mins[j] = min & 63;
    scales[4 + j] = static_cast<uint8_t>((low & 15) | (scale >> 6) << 4);
    mins[4 + j] = static_cast<uint8_t>((low >> 4) | (min >> 6) << 4);
  }
}

}  // namespace edge
