// The scale of an activation block, in scalar code that every ISA shares. Internal linkage: compiled under several flags.
//
// As ggml has it, so that the same file gives the same integers: q = round(x * (127 / max|x|)). A block of 32 keeps its
// scale at f16 precision (ggml stores it so), a block of 256 in f32. Outside f16's normal range f32 stays, where ggml
// would lose the block.
#pragma once

#include <bit>
#include <cstdint>

namespace edge {
namespace {

struct ActScale {
  float inverse;  // what x is multiplied with
  float d;        // what q is worth
  bool zero;      // all values are zero, or too small to have an inverse: d and q are zero
};

[[maybe_unused]] inline float round_to_f16_precision(float d) {
  if (!(d >= 0x1p-14f && d <= 65504.0f)) return d;
  const uint32_t bits = std::bit_cast<uint32_t>(d);
  return std::bit_cast<float>((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu);  // to nearest even, 10 bits
}

// max_bits: the largest |x| of n values by bit pattern, where NaN > infinity > finite.
[[maybe_unused]] inline ActScale act_scale(uint32_t max_bits, int n) {
  const float max = std::bit_cast<float>(max_bits);
  const float inverse = 127.0f / max;
  if (inverse == std::bit_cast<float>(0x7f800000u)) return {0.0f, 0.0f, true};
  return {inverse, n == 32 ? round_to_f16_precision(max / 127.0f) : 1.0f / inverse, false};
}

}  // namespace
}  // namespace edge
