// One block of one row in and out of a tile block of 16 rows: pure moves, the stored values keep their bits.
// The bytes of a row lie in words of four, 64 bytes (16 rows) apart; per-row scales lie side by side.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/formats/decoders.h"
#include "kernels/formats/float_bits.h"

namespace edge {

inline constexpr uint32_t kLowNibbles = 0x0f0f0f0fu;

// n plain values of a row into the [k][16] layout.
template <typename T>
static inline void put_values(std::byte* __restrict tile, int64_t row, const std::byte* __restrict values, int64_t n) {
  const auto size = static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; ++i) store(tile + (i * 16 + row) * size, load<T>(values + i * size));
}

// n words of a row, each XOR `flip`, into tile bytes [s*64 + row*4].
static inline void put_words(std::byte* __restrict tile, int64_t row, const std::byte* __restrict words, int n,
                             uint32_t flip = 0) {
  for (int s = 0; s < n; ++s) store(tile + s * 64 + row * 4, load<uint32_t>(words + s * 4) ^ flip);
}

static inline void take_words(const std::byte* __restrict tile, int64_t row, std::byte* __restrict words, int n,
                              uint32_t flip = 0) {
  for (int s = 0; s < n; ++s) store(words + s * 4, load<uint32_t>(tile + s * 64 + row * 4) ^ flip);
}

static inline void put_half(std::byte* tile, int64_t row, const std::byte* half) {
  store(tile + row * 2, load<uint16_t>(half));
}
static inline void take_half(const std::byte* tile, int64_t row, std::byte* half) {
  store(half, load<uint16_t>(tile + row * 2));
}

// d[16], q[8 words][16 rows] with the sign bit flipped: unsigned bytes q + 128.
static inline void put_q8_0(std::byte* tile, int64_t row, const std::byte* block) {
  put_half(tile, row, block);
  put_words(tile + 32, row, block + 2, 8, 0x80808080u);
}
static inline void take_q8_0(const std::byte* tile, int64_t row, std::byte* block) {
  take_half(tile, row, block);
  take_words(tile + 32, row, block + 2, 8, 0x80808080u);
}

// d[16], q[4 words][16 rows].
static inline void put_q4_0(std::byte* tile, int64_t row, const std::byte* block) {
  put_half(tile, row, block);
  put_words(tile + 32, row, block + 2, 4);
}
static inline void take_q4_0(const std::byte* tile, int64_t row, std::byte* block) {
  take_half(tile, row, block);
  take_words(tile + 32, row, block + 2, 4);
}

// d[16], dmin[16], low[8][16], top[4][16], q[4 pairs][8 words][16 rows].
static inline void put_q4_k(std::byte* tile, int64_t row, const std::byte* block) {
  put_half(tile, row, block);
  put_half(tile + 32, row, block + 2);
  uint8_t scales[8], mins[8];
  unpack_scales_and_mins(reinterpret_cast<const uint8_t*>(block) + 4, scales, mins);
  auto* low = reinterpret_cast<uint8_t*>(tile) + 64;
  for (int j = 0; j < 8; ++j) low[j * 16 + row] = static_cast<uint8_t>((scales[j] & 15) | (mins[j] & 15) << 4);
  uint8_t* top = low + 128;
  for (int j = 0; j < 8; j += 2) {
    const int even = scales[j] >> 4 | mins[j] >> 4 << 2;
    const int odd = scales[j + 1] >> 4 | mins[j + 1] >> 4 << 2;
    top[j / 2 * 16 + row] = static_cast<uint8_t>(even | odd << 4);
  }
  put_words(tile + 256, row, block + 16, 32);
}
static inline void take_q4_k(const std::byte* tile, int64_t row, std::byte* block) {
  take_half(tile, row, block);
  take_half(tile + 32, row, block + 2);
  const auto* low = reinterpret_cast<const uint8_t*>(tile) + 64;
  const uint8_t* top = low + 128;
  auto* packed = reinterpret_cast<uint8_t*>(block) + 4;
  uint8_t scales[8], mins[8];
  for (int j = 0; j < 8; ++j) {
    const int nibble = top[j / 2 * 16 + row] >> (j % 2 * 4);
    scales[j] = static_cast<uint8_t>((low[j * 16 + row] & 15) | (nibble & 3) << 4);
    mins[j] = static_cast<uint8_t>(low[j * 16 + row] >> 4 | (nibble >> 2 & 3) << 4);
  }
  for (int j = 0; j < 4; ++j) {
    packed[j] = static_cast<uint8_t>(scales[j] | scales[4 + j] >> 4 << 6);
    packed[4 + j] = static_cast<uint8_t>(mins[j] | mins[4 + j] >> 4 << 6);
    packed[8 + j] = static_cast<uint8_t>((scales[4 + j] & 15) | (mins[4 + j] & 15) << 4);
  }
  take_words(tile + 256, row, block + 16, 32);
}

// d[16], scales[16 groups][16], low nibbles [4 pairs][8 words][16 rows], top bits [2 quads][8 words][16 rows].
// The block pairs runs 0 and 2, 1 and 3 of each 128 values in a byte; the tile pairs 0 and 1, 2 and 3.
static inline void put_q6_k(std::byte* tile, int64_t row, const std::byte* block) {
  put_half(tile, row, block + 208);
  for (int group = 0; group < 16; ++group) tile[32 + group * 16 + row] = block[192 + group];
  for (int half = 0; half < 2; ++half) {
    std::byte* pairs = tile + 288 + half * 1024;
    for (int s = 0; s < 8; ++s) {
      const auto first = load<uint32_t>(block + half * 64 + s * 4);
      const auto second = load<uint32_t>(block + half * 64 + 32 + s * 4);
      store(pairs + s * 64 + row * 4, (first & kLowNibbles) | (second & kLowNibbles) << 4);
      store(pairs + 512 + s * 64 + row * 4, (first >> 4 & kLowNibbles) | (second & ~kLowNibbles));
    }
  }
  put_words(tile + 2336, row, block + 128, 16);
}
static inline void take_q6_k(const std::byte* tile, int64_t row, std::byte* block) {
  take_half(tile, row, block + 208);
  for (int group = 0; group < 16; ++group) block[192 + group] = tile[32 + group * 16 + row];
  for (int half = 0; half < 2; ++half) {
    const std::byte* pairs = tile + 288 + half * 1024;
    for (int s = 0; s < 8; ++s) {
      const auto even = load<uint32_t>(pairs + s * 64 + row * 4);
      const auto odd = load<uint32_t>(pairs + 512 + s * 64 + row * 4);
      store(block + half * 64 + s * 4, (even & kLowNibbles) | (odd & kLowNibbles) << 4);
      store(block + half * 64 + 32 + s * 4, (even >> 4 & kLowNibbles) | (odd & ~kLowNibbles));
    }
  }
  take_words(tile + 2336, row, block + 128, 16);
}

}  // namespace edge
