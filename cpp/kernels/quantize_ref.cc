// The definition of activation quantisation: q = round to nearest even of x * (127 / max|x|), d as act_scale.h has it.
// The maximum is taken over the bit patterns without sign, where NaN > infinity > finite: a block that holds a
// non-finite value gets a non-finite d, so it shows in the output instead of vanishing in q.
#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/act_scale.h"
#include "kernels/gemv_table.h"
#include "kernels/half.h"

namespace edge {
namespace {

// Quantises n values; returns d.
float quantize_block(const float* x, int64_t n, int8_t* q) {
  uint32_t max_bits = 0;
  for (int64_t i = 0; i < n; ++i) max_bits = std::max(max_bits, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  const ActScale scale = act_scale(max_bits, static_cast<int>(n));
  for (int64_t i = 0; i < n; ++i) {
    if (scale.zero) {
      q[i] = 0;
      continue;
    }
    // The product may pass 127 by a rounding; a NaN compares false and becomes -127.
    float value = x[i] * scale.inverse;
    value = value > -127.0f ? value : -127.0f;
    value = value < 127.0f ? value : 127.0f;
    q[i] = static_cast<int8_t>(std::nearbyint(value));
  }
  return scale.d;
}

int32_t sum_of(const int8_t* q, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += q[i];
  return sum;
}

}  // namespace

EDGE_DECLARE_GEMV_TABLE(ref);

void quantize_q8x32_ref(const float* x, int64_t k, ActQ8x32* out) {
  for (int64_t b = 0; b < k / 32; ++b) {
    out[b].d = quantize_block(x + b * 32, 32, out[b].q);
    out[b].sum = sum_of(out[b].q, 32);
  }
}

void quantize_q8x256_ref(const float* x, int64_t k, ActQ8x256* out) {
  for (int64_t b = 0; b < k / 256; ++b) {
    out[b].d = quantize_block(x + b * 256, 256, out[b].q);
    out[b].pad = 0;
    for (int64_t g = 0; g < 16; ++g) out[b].sums[g] = static_cast<int16_t>(sum_of(out[b].q + g * 16, 16));
  }
}

uint64_t read_bytes_ref(const std::byte* data, int64_t n_bytes) {
  uint64_t sums[4] = {};
  for (int64_t i = 0; i < n_bytes; i += 32) {
    for (int64_t j = 0; j < 4; ++j) sums[j] += load_as<uint64_t>(data + i + 8 * j);
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

int64_t multiply_int8_ref(int64_t n_steps) {
  constexpr int64_t kValues = 64;
  int32_t sums[kValues] = {};
  int8_t a[kValues] = {}, b[kValues] = {};
  for (int64_t i = 0; i < n_steps; ++i) {
    __asm__ volatile("" : "+m"(a), "+m"(b));
    for (int64_t j = 0; j < kValues; ++j) sums[j] += a[j] * b[j];
  }
  __asm__ volatile("" : : "m"(sums));
  return n_steps * kValues;
}

}  // namespace edge
