#include <arm_neon.h>

#include "kernels/act_scale.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(neon);

namespace {

// The maxnm/minnm forms give the number when the other operand is a NaN: the bound, as the definition asks.
inline int32x4_t quantized(const float* x, float32x4_t inverse, uint32x4_t keep) {
  float32x4_t value = vmulq_f32(vld1q_f32(x), inverse);
  value = vminnmq_f32(vmaxnmq_f32(value, vdupq_n_f32(-127.0f)), vdupq_n_f32(127.0f));
  return vandq_s32(vcvtnq_s32_f32(value), vreinterpretq_s32_u32(keep));
}

// As quantize_ref.cc defines it; n is 32 or 256, sum(g, value) takes the sum of each group of 16.
template <int n, typename Sum>
inline float quantize_block(const float* x, int8_t* q, const Sum& sum) {
  uint32x4_t max_bits = vdupq_n_u32(0);
  for (int i = 0; i < n; i += 4) {
    max_bits = vmaxq_u32(max_bits, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffffu)));
  }
  const ActScale scale = act_scale(vmaxvq_u32(max_bits), n);
  const uint32x4_t keep = vdupq_n_u32(scale.zero ? 0u : 0xffffffffu);
  const float32x4_t inverse = vdupq_n_f32(scale.inverse);
  for (int g = 0; g < n / 16; ++g) {
    const float* values = x + 16 * g;
    const int16x8_t first = vcombine_s16(vmovn_s32(quantized(values, inverse, keep)),
                                         vmovn_s32(quantized(values + 4, inverse, keep)));
    const int16x8_t second = vcombine_s16(vmovn_s32(quantized(values + 8, inverse, keep)),
                                          vmovn_s32(quantized(values + 12, inverse, keep)));
    vst1q_s8(q + 16 * g, vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
    sum(g, static_cast<int32_t>(vaddvq_s16(vaddq_s16(first, second))));
  }
  return scale.d;
}

}  // namespace

void quantize_q8x32_neon(const float* x, int64_t k, ActQ8x32* out) {
  for (int64_t b = 0; b < k / 32; ++b) {
    int32_t total = 0;
    out[b].d = quantize_block<32>(x + b * 32, out[b].q, [&](int, int32_t sum) { total += sum; });
    out[b].sum = total;
  }
}

void quantize_q8x256_neon(const float* x, int64_t k, ActQ8x256* out) {
  for (int64_t b = 0; b < k / 256; ++b) {
    ActQ8x256& block = out[b];
    block.pad = 0;
    block.d = quantize_block<256>(x + b * 256, block.q,
                                  [&](int g, int32_t sum) { block.sums[g] = static_cast<int16_t>(sum); });
  }
}

uint64_t read_bytes_neon(const std::byte* data, int64_t n_bytes) {
  uint64x2_t sums[8];
  for (uint64x2_t& sum : sums) sum = vdupq_n_u64(0);
  const auto* bytes = reinterpret_cast<const uint8_t*>(data);
  for (int64_t i = 0; i < n_bytes; i += 128) {
    __builtin_prefetch(bytes + i + 1024);
    __builtin_prefetch(bytes + i + 1088);
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j) {
      sums[j] = vaddq_u64(sums[j], vreinterpretq_u64_u8(vld1q_u8(bytes + i + 16 * j)));
    }
  }
  for (int j = 1; j < 8; ++j) sums[0] = vaddq_u64(sums[0], sums[j]);
  return vgetq_lane_u64(sums[0], 0) + vgetq_lane_u64(sums[0], 1);
}

}  // namespace edge
