// f32 -> blocks, with the bits of gguf.quants.quantize: d is found in f32, the values are divided by that d, and only
// then is d rounded to f16.
#include <cmath>
#include <cstring>

#include "kernels/formats/float_bits.h"
#include "kernels/tiling.h"

namespace edge {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;

// The largest |x| as bits: ordered like the values, and a NaN is above every number.
uint32_t largest_magnitude(const float* __restrict x) {
  int32_t largest = 0;
  for (int j = 0; j < 32; ++j) {
    const auto magnitude = static_cast<int32_t>(std::bit_cast<uint32_t>(x[j]) & kMagnitude);
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<uint32_t>(largest);
}

float inverse(float d) { return d == 0.0f ? 0.0f : 1.0f / d; }

// Not finite: a NaN or infinity among the weights, or a subnormal d whose inverse overflows. Such d is zero or not
// finite as f16, so that the stored q carries nothing; it is 0 as numpy's cast makes it.
bool usable(float d, float inverse_d) { return std::isfinite(d) && std::isfinite(inverse_d); }

// d = amax / 127, q = x / d rounded half away from zero. |x / d| stays below 127.5.
void quantize_q8_0(const float* __restrict x, std::byte* __restrict block) {
  const float d = std::bit_cast<float>(largest_magnitude(x)) / 127.0f;
  const float inverse_d = inverse(d);
  store(block, float_to_half(d));
  if (!usable(d, inverse_d)) {
    std::memset(block + 2, 0, 32);
    return;
  }
  auto* q = reinterpret_cast<uint8_t*>(block) + 2;
  for (int j = 0; j < 32; ++j) {
    const float scaled = x[j] * inverse_d;
    const float size = std::fabs(scaled);
    const auto whole = static_cast<int32_t>(size);
    const int32_t rounded = whole + (size - static_cast<float>(whole) >= 0.5f ? 1 : 0);
    q[j] = static_cast<uint8_t>(scaled < 0.0f ? -rounded : rounded);
  }
}

// d = (the value of largest size, sign kept) / -8, q = x / d + 8.5 cut to 0..15. The result before the cut is at
// least 0 and below 17.
void quantize_q4_0(const float* __restrict x, std::byte* __restrict block) {
  const uint32_t largest = largest_magnitude(x);
  int at = 0;
  while ((std::bit_cast<uint32_t>(x[at]) & kMagnitude) != largest) ++at;
  const float d = x[at] / -8.0f;
  const float inverse_d = inverse(d);
  store(block, float_to_half(d));
  if (!usable(d, inverse_d)) {
    std::memset(block + 2, 0, 16);
    return;
  }
  uint8_t q[32];
  for (int j = 0; j < 32; ++j) {
    const auto whole = static_cast<int32_t>(x[j] * inverse_d + 8.5f);
    q[j] = static_cast<uint8_t>(whole > 15 ? 15 : whole);
  }
  auto* packed = reinterpret_cast<uint8_t*>(block) + 2;
  for (int j = 0; j < 16; ++j) packed[j] = static_cast<uint8_t>(q[j] | q[16 + j] << 4);
}

}  // namespace

void quantize_row(WeightFormat format, const float* __restrict values, int64_t n, std::byte* __restrict blocks) {
  switch (format) {
    case WeightFormat::kF32: std::memcpy(blocks, values, static_cast<size_t>(n) * sizeof(float)); break;
    case WeightFormat::kF16:
      for (int64_t i = 0; i < n; ++i) store(blocks + 2 * i, float_to_half(values[i]));
      break;
    case WeightFormat::kBF16:
      for (int64_t i = 0; i < n; ++i) store(blocks + 2 * i, float_to_bfloat(values[i]));
      break;
    case WeightFormat::kQ8_0:
      for (int64_t b = 0; b < n / 32; ++b) quantize_q8_0(values + 32 * b, blocks + 34 * b);
      break;
    case WeightFormat::kQ4_0:
      for (int64_t b = 0; b < n / 32; ++b) quantize_q4_0(values + 32 * b, blocks + 18 * b);
      break;
    default: break;
  }
}

}  // namespace edge
