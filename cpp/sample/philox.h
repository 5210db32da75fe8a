// Random numbers without state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <array>
#include <cstdint>

namespace edge {

using PhiloxWords = std::array<uint32_t, 4>;

inline PhiloxWords philox4x32(PhiloxWords counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// What numbers are drawn for: numbers of different purposes are independent.
enum class Purpose : uint32_t { kToken = 0, kDraft = 1, kAccept = 2, kResidual = 3 };

// The block that belongs to one token at one position of the text under one seed.
inline PhiloxWords philox(uint64_t seed, uint64_t position, int32_t id, Purpose purpose = Purpose::kToken) {
  const auto low = [](uint64_t word) { return static_cast<uint32_t>(word); };
  return philox4x32({static_cast<uint32_t>(id), low(position), low(position >> 32), static_cast<uint32_t>(purpose)},
                    {low(seed), low(seed >> 32)});
}

// Uniform on the centres of 2^52 cells of (0, 1): never 0 or 1, and 1 - u is exact.
inline double philox_uniform(uint64_t seed, uint64_t position, int32_t id, Purpose purpose = Purpose::kToken) {
  const PhiloxWords words = philox(seed, position, id, purpose);
  const uint64_t bits = (uint64_t{words[1]} << 32 | words[0]) >> 12;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

}  // namespace edge
