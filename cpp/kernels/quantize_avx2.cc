#include <immintrin.h>

#include "kernels/act_scale.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(avx2);

namespace {

inline int32_t reduce_add(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

inline uint32_t reduce_max(__m256i v) {
  __m128i max = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  max = _mm_max_epu32(max, _mm_shuffle_epi32(max, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(max, _mm_shuffle_epi32(max, 0xb1))));
}

// vmaxps gives its second operand for a NaN: the bound, as the definition asks.
inline __m256i quantized(const float* x, __m256 inverse, __m256i keep) {
  __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x), inverse);
  value = _mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f));
  return _mm256_and_si256(_mm256_cvtps_epi32(value), keep);
}

// As quantize_ref.cc defines it; n is 32 or 256, sum(g, value) takes the sum of each group of 16.
template <int n, typename Sum>
inline float quantize_block(const float* x, int8_t* q, const Sum& sum) {
  __m256i max_bits = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    max_bits = _mm256_max_epu32(max_bits, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  const ActScale scale = act_scale(reduce_max(max_bits), n);
  const __m256i keep = _mm256_set1_epi32(scale.zero ? 0 : -1);
  const __m256 inverse = _mm256_set1_ps(scale.inverse);
  for (int g = 0; g < n / 16; ++g) {
    const __m256i first = quantized(x + 16 * g, inverse, keep);
    const __m256i second = quantized(x + 16 * g + 8, inverse, keep);
    // packs works within 128-bit lanes; the permutation restores the order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * g), bytes);
    sum(g, reduce_add(_mm256_add_epi32(first, second)));
  }
  return scale.d;
}

}  // namespace

void quantize_q8x32_avx2(const float* x, int64_t k, ActQ8x32* out) {
  for (int64_t b = 0; b < k / 32; ++b) {
    int32_t total = 0;
    out[b].d = quantize_block<32>(x + b * 32, out[b].q, [&](int, int32_t sum) { total += sum; });
    out[b].sum = total;
  }
}

void quantize_q8x256_avx2(const float* x, int64_t k, ActQ8x256* out) {
  for (int64_t b = 0; b < k / 256; ++b) {
    ActQ8x256& block = out[b];
    block.pad = 0;
    block.d = quantize_block<256>(x + b * 256, block.q,
                                  [&](int g, int32_t sum) { block.sums[g] = static_cast<int16_t>(sum); });
  }
}

uint64_t read_bytes_avx2(const std::byte* data, int64_t n_bytes) {
  __m256i sums[8];
#pragma GCC unroll 8
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < n_bytes; i += 256) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j) {
      if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(data + i + 32 * j + 8192), _MM_HINT_T0);
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j));
      sums[j] = _mm256_add_epi64(sums[j], value);
    }
  }
  __m256i total = sums[0];
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) total = _mm256_add_epi64(total, sums[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(total, 0)) + static_cast<uint64_t>(_mm256_extract_epi64(total, 1)) +
         static_cast<uint64_t>(_mm256_extract_epi64(total, 2)) + static_cast<uint64_t>(_mm256_extract_epi64(total, 3));
}

}  // namespace edge
