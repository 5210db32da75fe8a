// Values of -1, 0, 1 under one scale per 256 (TriLM and BitNet checkpoints).
#include "kernels/formats/decoders.h"
#include "kernels/formats/float_bits.h"

namespace edge {
namespace {

// A byte holds up to five trits as a fraction of 256: trit i is the whole part of 3 * frac(byte / 256 * 3^i).
float trit(uint8_t packed, int power_of_three) {
  const auto shifted = static_cast<uint8_t>(packed * power_of_three);
  return static_cast<float>((shifted * 3 >> 8) - 1);
}

constexpr int kPowers[5] = {1, 3, 9, 27, 81};

}  // namespace

// 32 bytes of five trits, 16 bytes of five, 4 bytes of four, f16 d; trit i of all bytes of a run comes before trit
// i + 1.
void decode_tq1_0(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 54, out += 256) {
    const float d = load_half(block + 52);
    for (int i = 0; i < 5; ++i)
      for (int j = 0; j < 32; ++j) out[32 * i + j] = d * trit(block[j], kPowers[i]);
    for (int i = 0; i < 5; ++i)
      for (int j = 0; j < 16; ++j) out[160 + 16 * i + j] = d * trit(block[32 + j], kPowers[i]);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) out[240 + 4 * i + j] = d * trit(block[48 + j], kPowers[i]);
  }
}

// q[64] of two bits, each 32 bytes holding four runs of 32, f16 d.
void decode_tq2_0(const std::byte* __restrict blocks, int64_t n_blocks, float* __restrict out) {
  for (const auto* block = reinterpret_cast<const uint8_t*>(blocks); n_blocks-- > 0; block += 66, out += 256) {
    const float d = load_half(block + 64);
    for (int run = 0; run < 8; ++run) {
      const uint8_t* q = block + run / 4 * 32;
      const int shift = run % 4 * 2;
      for (int j = 0; j < 32; ++j) out[32 * run + j] = d * static_cast<float>(((q[j] >> shift) & 3) - 1);
    }
  }
}

}  // namespace edge
