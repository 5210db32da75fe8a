#include <immintrin.h>

#include "kernels/act_scale.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx512vnni);

namespace {

// As quantize_ref.cc defines it; n is 32 or 256, sum(g, value) takes the sum of each group of 16.
template <int n, typename Sum>
inline float quantize_block(const float* x, int8_t* q, const Sum& sum) {
  __m512i max_bits = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int g = 0; g < n / 16; ++g) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + 16 * g), _mm512_set1_epi32(0x7fffffff));
    max_bits = _mm512_max_epu32(max_bits, bits);
  }
  const ActScale scale = act_scale(_mm512_reduce_max_epu32(max_bits), n);
  const __mmask16 keep = scale.zero ? 0 : 0xffff;
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
#pragma GCC unroll 2
  for (int g = 0; g < n / 16; ++g) {
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * g), inverse);
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(-127.0f)), _mm512_set1_ps(127.0f));
    const __m512i rounded = _mm512_maskz_cvtps_epi32(keep, value);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * g), _mm512_cvtepi32_epi8(rounded));
    sum(g, _mm512_reduce_add_epi32(rounded));
  }
  return scale.d;
}

}  // namespace

void quantize_q8x32_avx512vnni(const float* x, int64_t k, ActQ8x32* out) {
  for (int64_t b = 0; b < k / 32; ++b) {
    int32_t total = 0;
    out[b].d = quantize_block<32>(x + b * 32, out[b].q, [&](int, int32_t sum) { total += sum; });
    out[b].sum = total;
  }
}

void quantize_q8x256_avx512vnni(const float* x, int64_t k, ActQ8x256* out) {
  for (int64_t b = 0; b < k / 256; ++b) {
    ActQ8x256& block = out[b];
    block.pad = 0;
    block.d = quantize_block<256>(x + b * 256, block.q,
                                  [&](int g, int32_t sum) { block.sums[g] = static_cast<int16_t>(sum); });
  }
}

uint64_t read_bytes_avx512vnni(const std::byte* data, int64_t n_bytes) {
  __m512i sums[8] = {};
  for (int64_t i = 0; i < n_bytes; i += 512) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(data + i + 64 * j + 8192), _MM_HINT_T0);
      sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(data + i + 64 * j));
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 1; j < 8; ++j) sums[0] = _mm512_add_epi64(sums[0], sums[j]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[0]));
}

}  // namespace edge
