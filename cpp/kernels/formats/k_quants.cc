// Super-blocks of 256 values with scales of their own for every 16 or 32 values. Each decoder forms d * scale first and
// keeps the order of float operations of gguf.quants, so that all 256 values have its bits.
#include "kernels/formats/decoders.h"
#include "kernels/formats/float_bits.h"

namespace edge {

// scales[16] (low nibble scale, high nibble min), q[64] of two bits, f16 d, f16 dmin. Each 32 bytes of q hold 128
// values: bits 2i..2i+1 belong to the i-th run of 32.
void decode_q2_k(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 84, out += 256) {
    const float d = load_half(block + 80), dmin = load_half(block + 82);
    for (int group = 0; group < 16; ++group) {
      const float scale = d * static_cast<float>(block[group] & 15);
      const float min = dmin * static_cast<float>(block[group] >> 4);
      const uint8_t* q = block + 16 + group / 8 * 32 + group % 2 * 16;
      const int shift = group / 2 % 4 * 2;
      for (int j = 0; j < 16; ++j) out[16 * group + j] = scale * static_cast<float>((q[j] >> shift) & 3) - min;
    }
  }
}

// hmask[32] (bit i: run i of 32 values), q[64] of two bits as in Q2_K, twelve bytes of sixteen six-bit scales, f16 d.
void decode_q3_k(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 110, out += 256) {
    const uint8_t* packed = block + 96;
    const float d = load_half(block + 108);
    for (int group = 0; group < 16; ++group) {
      const int low = (packed[group % 8] >> (group / 8 * 4)) & 15;
      const int top = (packed[8 + group % 4] >> (group / 4 * 2)) & 3;
      const float scale = d * static_cast<float>((low | top << 4) - 32);
      const uint8_t* q = block + 32 + group / 8 * 32 + group % 2 * 16;
      const uint8_t* mask = block + group % 2 * 16;
      const int shift = group / 2 % 4 * 2, bit = group / 2;
      for (int j = 0; j < 16; ++j) {
        // A clear mask bit takes four away.
        const int offset = 4 - ((mask[j] >> bit) & 1) * 4;
        out[16 * group + j] = scale * static_cast<float>(((q[j] >> shift) & 3) - offset);
      }
    }
  }
}

// f16 d, f16 dmin, twelve bytes of scales and mins, q[128]: 32 bytes per pair of runs, low nibble the even one.
void decode_q4_k(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 144, out += 256) {
    const float d = load_half(block), dmin = load_half(block + 2);
    uint8_t scales[8], mins[8];
    unpack_scales_and_mins(block + 4, scales, mins);
    for (int sub = 0; sub < 8; ++sub) {
      const float scale = d * static_cast<float>(scales[sub]), min = dmin * static_cast<float>(mins[sub]);
      const uint8_t* q = block + 16 + sub / 2 * 32;
      const int shift = sub % 2 * 4;
      for (int j = 0; j < 32; ++j) out[32 * sub + j] = scale * static_cast<float>((q[j] >> shift) & 15) - min;
    }
  }
}

// As Q4_K, with qh[32] before q: bit i of byte j is the fifth bit of value j of run i.
void decode_q5_k(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 176, out += 256) {
    const float d = load_half(block), dmin = load_half(block + 2);
    uint8_t scales[8], mins[8];
    unpack_scales_and_mins(block + 4, scales, mins);
    const uint8_t* high = block + 16;
    for (int sub = 0; sub < 8; ++sub) {
      const float scale = d * static_cast<float>(scales[sub]), min = dmin * static_cast<float>(mins[sub]);
      const uint8_t* q = block + 48 + sub / 2 * 32;
      const int shift = sub % 2 * 4;
      for (int j = 0; j < 32; ++j) {
        const int value = ((q[j] >> shift) & 15) | ((high[j] >> sub) & 1) << 4;
        out[32 * sub + j] = scale * static_cast<float>(value) - min;
      }
    }
  }
}

// ql[128], qh[64], int8 scales[16], f16 d. Each 64 bytes of ql hold 128 values: runs of 32 are the low nibbles of the
// first and second 32 bytes, then their high nibbles; bits 2i..2i+1 of qh belong to run i.
void decode_q6_k(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 210, out += 256) {
    const float d = load_half(block + 208);
    for (int group = 0; group < 16; ++group) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(block[192 + group]));
      const int half = group / 8, run = group / 2 % 4, first = group % 2 * 16;
      const uint8_t* low = block + half * 64 + run % 2 * 32 + first;
      const uint8_t* high = block + 128 + half * 32 + first;
      const int low_shift = run / 2 * 4, high_shift = run * 2;
      for (int j = 0; j < 16; ++j) {
        const int value = (((low[j] >> low_shift) & 15) | ((high[j] >> high_shift) & 3) << 4) - 32;
        out[16 * group + j] = scale * static_cast<float>(value);
      }
    }
  }
}

// f16 d, u16 top two bits and four bytes low nibbles of eight six-bit scales, q[128] as eight IQ4_NL blocks.
void decode_iq4_xs(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 136, out += 256) {
    const float d = load_half(block);
    const int tops = load<uint16_t>(block + 2);
    for (int sub = 0; sub < 8; ++sub) {
      const int low = (block[4 + sub / 2] >> (sub % 2 * 4)) & 15;
      const float scale = d * static_cast<float>((low | ((tops >> (2 * sub)) & 3) << 4) - 32);
      const uint8_t* q = block + 8 + 16 * sub;
      for (int j = 0; j < 16; ++j) {
        out[32 * sub + j] = scale * static_cast<float>(kIq4Steps[q[j] & 15]);
        out[32 * sub + 16 + j] = scale * static_cast<float>(kIq4Steps[q[j] >> 4]);
      }
    }
  }
}

}  // namespace edge
