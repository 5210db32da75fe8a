#include "io/xxh3.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edge {
namespace {

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                   kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;

constexpr size_t kSecretBytes = 192;
alignas(64) constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

constexpr size_t kStripeBytes = 64;
constexpr int kLanes = 8;
constexpr size_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / 8;
constexpr size_t kBlockBytes = kStripesPerBlock * kStripeBytes;
constexpr size_t kScrambleSecret = kSecretBytes - kStripeBytes;
constexpr size_t kLastStripeSecret = kSecretBytes - kStripeBytes - 7;
constexpr size_t kMergeSecret = 11;

inline uint64_t load64(const void* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// The lanes of all whole stripes but the last. One body per instruction set.
using Consume = void (*)(const std::byte* data, size_t bytes, uint64_t* lanes);

[[maybe_unused]] void consume_scalar(const std::byte* data, size_t bytes, uint64_t* lanes) {
  const size_t n_stripes = (bytes - 1) / kStripeBytes;
  for (size_t stripe = 0; stripe < n_stripes; ++stripe) {
    const size_t in_block = stripe % kStripesPerBlock;
    const std::byte* at = data + stripe * kStripeBytes;
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t value = load64(at + 8 * i);
      const uint64_t key = value ^ load64(kSecret + 8 * in_block + 8 * i);
      lanes[i ^ 1] += value;
      lanes[i] += (key & 0xFFFFFFFF) * (key >> 32);
    }
    if (in_block == kStripesPerBlock - 1) {
      for (int i = 0; i < kLanes; ++i) {
        lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ load64(kSecret + kScrambleSecret + 8 * i)) * kPrime32_1;
      }
    }
  }
}

#if defined(__x86_64__)
// The baseline's two-lane vectors reach half the speed, hence a body of its own, picked at run time.
__attribute__((target("avx2"))) void consume_avx2(const std::byte* data, size_t bytes, uint64_t* lanes) {
  const size_t n_stripes = (bytes - 1) / kStripeBytes;
  __m256i acc[2];
  for (int i = 0; i < 2; ++i) acc[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes) + i);
  for (size_t stripe = 0; stripe < n_stripes; ++stripe) {
    const size_t in_block = stripe % kStripesPerBlock;
    const auto* at = reinterpret_cast<const __m256i*>(data + stripe * kStripeBytes);
    const auto* secret = reinterpret_cast<const __m256i*>(kSecret + 8 * in_block);
    // Eight stripes ahead hides the latency of memory that a read has just filled.
    _mm_prefetch(reinterpret_cast<const char*>(at) + 8 * kStripeBytes, _MM_HINT_T0);
    for (int i = 0; i < 2; ++i) {
      const __m256i value = _mm256_loadu_si256(at + i);
      const __m256i key = _mm256_xor_si256(value, _mm256_loadu_si256(secret + i));
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
      acc[i] = _mm256_add_epi64(acc[i], _mm256_add_epi64(product, swapped));
    }
    if (in_block == kStripesPerBlock - 1) {
      const auto* scramble = reinterpret_cast<const __m256i*>(kSecret + kScrambleSecret);
      const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(kPrime32_1));
      for (int i = 0; i < 2; ++i) {
        const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(acc[i], _mm256_srli_epi64(acc[i], 47)),
                                               _mm256_loadu_si256(scramble + i));
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
        acc[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
      }
    }
  }
  for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes) + i, acc[i]);
}
#endif

Consume pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) return consume_avx2;
#endif
  return consume_scalar;
}

uint64_t folded_product(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t hash) {
  hash ^= hash >> 37;
  hash *= 0x165667919E3779F9;
  return hash ^ (hash >> 32);
}

// 129 to 240 bytes: 16 at a time, with an avalanche after the eighth.
uint64_t hash_medium(std::span<const std::byte> data) {
  constexpr size_t kStep = 16, kFirstSteps = 8, kSecondSecret = 3, kLastSecret = 136 - 17;
  const auto mix = [&](size_t at, size_t secret) {
    return folded_product(load64(data.data() + at) ^ load64(kSecret + secret),
                          load64(data.data() + at + 8) ^ load64(kSecret + secret + 8));
  };
  uint64_t hash = data.size() * kPrime64_1;
  for (size_t i = 0; i < data.size() / kStep; ++i) {
    if (i == kFirstSteps) hash = avalanche(hash);
    hash += mix(i * kStep, i < kFirstSteps ? i * kStep : (i - kFirstSteps) * kStep + kSecondSecret);
  }
  // Below 144 bytes there are only eight steps.
  if (data.size() / kStep == kFirstSteps) hash = avalanche(hash);
  return avalanche(hash + mix(data.size() - kStep, kLastSecret));
}

}  // namespace

uint64_t xxh3(std::span<const std::byte> data) {
  if (data.size() <= kXxh3ShortBytes) return 0;
  if (data.size() <= kXxh3MediumBytes) return hash_medium(data);
  static const Consume consume = pick();
  alignas(64) uint64_t lanes[kLanes] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                        kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  consume(data.data(), data.size(), lanes);
  // The last 64 bytes always count, though they may overlap the stripe before them.
  const std::byte* last = data.data() + data.size() - kStripeBytes;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t value = load64(last + 8 * i);
    const uint64_t key = value ^ load64(kSecret + kLastStripeSecret + 8 * i);
    lanes[i ^ 1] += value;
    lanes[i] += (key & 0xFFFFFFFF) * (key >> 32);
  }
  uint64_t hash = data.size() * kPrime64_1;
  for (int i = 0; i < kLanes; i += 2) {
    const unsigned char* secret = kSecret + kMergeSecret + 8 * i;
    hash += folded_product(lanes[i] ^ load64(secret), lanes[i + 1] ^ load64(secret + 8));
  }
  return avalanche(hash);
}

}  // namespace edge
