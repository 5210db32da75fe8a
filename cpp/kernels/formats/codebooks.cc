// IQ1, IQ2, IQ3: vectors of 4 or 8 values are looked up in a grid; IQ2 and IQ3 keep the signs apart.
#include <bit>

#include "kernels/formats/block.h"
#include "kernels/formats/decoders.h"
#include "kernels/formats/float_bits.h"

namespace edge {
namespace {

// out[j] = (scale * entry[j]) * sign j.
template <int n>
inline void put_signed(const int8_t* __restrict entry, float scale, uint32_t signs, float* __restrict out) {
  for (int j = 0; j < n; ++j) {
    const auto bits = std::bit_cast<uint32_t>(scale * static_cast<float>(entry[j]));
    out[j] = std::bit_cast<float>(bits ^ (signs << (31 - j) & 0x80000000u));
  }
}

// Seven stored signs; the eighth makes the number of minus signs even.
inline uint32_t eight_signs(uint32_t seven) {
  uint32_t parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 1) << 7;
}

// IQ1: out[j] = scale * (entry[j] + delta).
inline void put_shifted(const int8_t* __restrict entry, float scale, float delta, float* __restrict out) {
  for (int j = 0; j < 8; ++j) out[j] = scale * (static_cast<float>(entry[j]) + delta);
}

constexpr float kIq1Delta = 0.125f;

}  // namespace

// f16 d, then for every 32 values four grid bytes and a word: 4 x 7 signs and a four-bit scale on top.
void decode_iq2_xxs(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq2Xxs);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 66) {
    const float d = load_half(block);
    for (int sub = 0; sub < 8; ++sub) {
      const uint8_t* index = block + 2 + 8 * sub;
      const auto word = load<uint32_t>(index + 4);
      const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
      for (int i = 0; i < 4; ++i, out += 8)
        put_signed<8>(grid + 8 * index[i], scale, eight_signs((word >> (7 * i)) & 127), out);
    }
  }
}

// f16 d, u16[32] (nine bits of grid index, seven signs), four-bit scales[16], one per 16 values.
void decode_iq2_xs(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq2Xs);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 74) {
    const float d = load_half(block);
    for (int i = 0; i < 32; ++i, out += 8) {
      const auto word = load<uint16_t>(block + 2 + 2 * i);
      const int nibble = (block[66 + i / 4] >> (i / 2 % 2 * 4)) & 15;
      const float scale = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
      put_signed<8>(grid + 8 * (word & 511), scale, eight_signs(word >> 9), out);
    }
  }
}

// f16 d, low bytes of the grid indices[32], signs[32], their top two bits qh[8], four-bit scales[16].
void decode_iq2_s(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq2S);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 82) {
    const float d = load_half(block);
    for (int i = 0; i < 32; ++i, out += 8) {
      const int index = block[2 + i] | ((block[66 + i / 4] >> (i % 4 * 2)) & 3) << 8;
      const int nibble = (block[74 + i / 4] >> (i / 2 % 2 * 4)) & 15;
      const float scale = d * (0.5f + static_cast<float>(nibble)) * 0.25f;
      put_signed<8>(grid + 8 * index, scale, block[34 + i], out);
    }
  }
}

// f16 d, grid indices[64] of four values each, then for every 32 values a word: 4 x 7 signs and a four-bit scale.
void decode_iq3_xxs(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq3Xxs);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 98) {
    const float d = load_half(block);
    for (int sub = 0; sub < 8; ++sub) {
      const auto word = load<uint32_t>(block + 66 + 4 * sub);
      const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
      for (int i = 0; i < 4; ++i, out += 8) {
        const uint8_t* index = block + 2 + 8 * sub + 2 * i;
        const uint32_t signs = eight_signs((word >> (7 * i)) & 127);
        put_signed<4>(grid + 4 * index[0], scale, signs, out);
        put_signed<4>(grid + 4 * index[1], scale, signs >> 4, out + 4);
      }
    }
  }
}

// f16 d, low bytes of the grid indices[64], their ninth bits qh[8], signs[32], four-bit scales[8], one per 32 values.
void decode_iq3_s(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq3S);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 110) {
    const float d = load_half(block);
    for (int i = 0; i < 32; ++i, out += 8) {
      const int nibble = (block[106 + i / 8] >> (i / 4 % 2 * 4)) & 15;
      const float scale = d * static_cast<float>(1 + 2 * nibble);
      const uint8_t* low = block + 2 + 2 * i;
      const int high = block[66 + i / 4] >> (i % 4 * 2);
      const uint32_t signs = block[74 + i];
      put_signed<4>(grid + 4 * (low[0] | (high & 1) << 8), scale, signs, out);
      put_signed<4>(grid + 4 * (low[1] | (high >> 1 & 1) << 8), scale, signs >> 4, out + 4);
    }
  }
}

// f16 d, low bytes of the grid indices[32], u16[8]: 4 x 3 top bits, a three-bit scale, the sign of delta.
void decode_iq1_s(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq1);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 50) {
    const float d = load_half(block);
    for (int sub = 0; sub < 8; ++sub) {
      const int word = load<uint16_t>(block + 34 + 2 * sub);
      const float scale = d * static_cast<float>(2 * ((word >> 12) & 7) + 1);
      const float delta = word & 0x8000 ? -kIq1Delta : kIq1Delta;
      for (int i = 0; i < 4; ++i, out += 8)
        put_shifted(grid + 8 * (block[2 + 4 * sub + i] | ((word >> (3 * i)) & 7) << 8), scale, delta, out);
    }
  }
}

// Low bytes of the grid indices[32], nibbles qh[32] (three top bits, the sign of delta), u16[4]: 4 x 3 bits of scale,
// one per 16 values, and on top the nibbles of the f16 d, lowest first.
void decode_iq1_m(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  const int8_t* grid = grid_values(Grid::kIq1);
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 56) {
    int words[4], bits = 0;
    for (int w = 0; w < 4; ++w) {
      words[w] = load<uint16_t>(block + 48 + 2 * w);
      bits |= (words[w] >> 12) << (4 * w);
    }
    const float d = half_to_float(static_cast<uint16_t>(bits));
    for (int i = 0; i < 32; ++i, out += 8) {
      const float scale = d * static_cast<float>(2 * ((words[i / 8] >> (i / 2 % 4 * 3)) & 7) + 1);
      const int nibble = (block[32 + i / 2] >> (i % 2 * 4)) & 15;
      const float delta = nibble & 8 ? -kIq1Delta : kIq1Delta;
      put_shifted(grid + 8 * (block[i] | (nibble & 7) << 8), scale, delta, out);
    }
  }
}

}  // namespace edge
