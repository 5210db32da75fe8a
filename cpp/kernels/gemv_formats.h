// How each quantised format's tile block becomes bytes to multiply: written once, compiled for every vector ISA.
// Layouts: formats/tile_block.cc. Internal linkage: each includer compiles its own copy under its own flags.
//
// `V` holds one word of four bytes for each of V::kLanes rows and a tile is V::kParts such vectors; V::words, bytes and
// halves load the values of one part. V::bits<from, n, to>(x) is bits [from, from + n) of every byte, moved to `to`.
// V::spread<a, b>(x) is bytes a and b of every word as a pair of int16. Shifts are of int16: masks drop what crosses.
//
// Unpack<V, format> gives
//   kMaxQuant, kOffset   quants are unsigned bytes up to kMaxQuant, kOffset (a power of two) larger than their value
//   quants<i, s>(w, u, part)   word s (values 4s..4s+3) of run u * kPeriod + i; a run is 32 values
// and of 256 values also
//   kPeriod              runs after which the layout repeats
//   kGroup               values under one scale, 32 or 16
//   scale<j>(w, part)    of run j as int16 pairs: its two groups of 16; twice the same where kGroup is 32
//   min<j>(w, part)      so too, where the format has mins (Scales::kTwoHalves)
#pragma once

#include "kernels/format.h"

namespace edge {
namespace {

template <typename V, WeightFormat kFormat>
struct Unpack;

inline constexpr uint32_t kBothLow4 = 0x000f000fu;
inline constexpr uint32_t kBothLow6 = 0x003f003fu;
inline constexpr uint32_t kBothTop2 = 0x00300030u;

template <typename V>
struct Unpack<V, WeightFormat::kQ8_0> {
  static constexpr int kMaxQuant = 255, kOffset = 128, kPeriod = 1;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int, int part) {
    return V::words(w + 32 + 64 * s, part);
  }
};

// The nibbles of 16 bytes a row: low ones values 0..15, high ones 16..31.
template <typename V, int s>
inline auto nibbles(const uint8_t* q, int part) {
  return V::template bits<4 * (s / 4), 4>(V::words(q + 64 * (s % 4), part));
}

template <typename V>
struct Unpack<V, WeightFormat::kQ4_0> {
  static constexpr int kMaxQuant = 15, kOffset = 8, kPeriod = 1;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int, int part) {
    return nibbles<V, s>(w + 32, part);
  }
};

// The 16 steps of IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl), 128 larger.
alignas(16) inline constexpr uint8_t kIq4StepsPlus128[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                             129, 141, 153, 166, 181, 197, 217, 241};

template <typename V>
struct Unpack<V, WeightFormat::kIQ4_NL> {
  static constexpr int kMaxQuant = 241, kOffset = 128, kPeriod = 1;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int, int part) {
    return V::lookup(kIq4StepsPlus128, nibbles<V, s>(w + 32, part));
  }
};

// E2M1 doubled, so that all are whole (OCP Microscaling Formats v1.0, 5.3.3), 16 larger.
alignas(16) inline constexpr uint8_t kE2m1DoubledPlus16[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                                               16, 15, 14, 13, 12, 10, 8,  4};

template <typename V>
struct Unpack<V, WeightFormat::kMXFP4> {
  static constexpr int kMaxQuant = 28, kOffset = 16, kPeriod = 1;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int, int part) {
    return V::lookup(kE2m1DoubledPlus16, nibbles<V, s>(w + 16, part));
  }
};

// d[16], dmin[16], low[8][16] bytes (nibbles of scale and min), top[4][16] (their top bits, two runs a byte), nibbles
// of four pairs of runs.
template <typename V>
struct Unpack<V, WeightFormat::kQ4_K> {
  static constexpr int kMaxQuant = 15, kOffset = 0, kPeriod = 2, kGroup = 32;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int u, int part) {
    return V::template bits<4 * i, 4>(V::words(w + 256 + 512 * u + 64 * s, part));
  }
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    return join<0, 4 * (j % 2)>(V::byte_pairs(w + 64 + 16 * j, part), V::byte_pairs(w + 192 + 16 * (j / 2), part));
  }
  template <int j>
  static inline auto min(const uint8_t* w, int part) {
    return join<4, 4 * (j % 2) + 2>(V::byte_pairs(w + 64 + 16 * j, part), V::byte_pairs(w + 192 + 16 * (j / 2), part));
  }

 private:
  template <int kLowAt, int kTopAt, typename W>
  static inline W join(W low, W top) {
    return V::either(V::mask(V::template shift<kLowAt>(low), kBothLow4),
                     V::mask(V::template shift<kTopAt - 4>(top), kBothTop2));
  }
};

// d[16], dmin[16], three words of ggml's packed scales and mins, top bits (bit j of a byte: run j), nibbles of four
// pairs of runs.
template <typename V>
struct Unpack<V, WeightFormat::kQ5_K> {
  static constexpr int kMaxQuant = 31, kOffset = 0, kPeriod = 8, kGroup = 32;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int, int part) {
    return V::either(V::template bits<4 * (i % 2), 4>(V::words(w + 768 + 512 * (i / 2) + 64 * s, part)),
                     V::template bits<i, 1, 4>(V::words(w + 256 + 64 * s, part)));
  }
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    return six_bits<j, 0>(w + 64, part);
  }
  template <int j>
  static inline auto min(const uint8_t* w, int part) {
    return six_bits<j, 1>(w + 64, part);
  }

 private:
  // Word kWhich holds numbers 0-3 and, on top, two bits of 4-7, whose low nibbles lie in word 2.
  template <int j, int kWhich>
  static inline auto six_bits(const uint8_t* packed, int part) {
    const auto first = V::template spread<j % 4, j % 4>(V::words(packed + 64 * kWhich, part));
    if constexpr (j < 4) {
      return V::mask(first, kBothLow6);
    } else {
      const auto low = V::template shift<4 * kWhich>(V::template spread<j % 4, j % 4>(V::words(packed + 128, part)));
      return V::either(V::mask(low, kBothLow4), V::mask(V::template shift<2>(first), kBothTop2));
    }
  }
};

// d[16], int8 scales[16][16], nibbles of four pairs of runs, top two bits of two fours of runs.
template <typename V>
struct Unpack<V, WeightFormat::kQ6_K> {
  static constexpr int kMaxQuant = 63, kOffset = 32, kPeriod = 4, kGroup = 16;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int u, int part) {
    return V::either(V::template bits<4 * (i % 2), 4>(V::words(w + 288 + 512 * (2 * u + i / 2) + 64 * s, part)),
                     V::template bits<2 * i, 2, 4>(V::words(w + 2336 + 512 * u + 64 * s, part)));
  }
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    return V::signed_pair(w + 32 + 32 * j, w + 48 + 32 * j, part);
  }
};

// d[16], dmin[16], four words of nibbles (scale and min of a group of 16 a byte), two bits of two fours of runs.
template <typename V>
struct Unpack<V, WeightFormat::kQ2_K> {
  static constexpr int kMaxQuant = 3, kOffset = 0, kPeriod = 4, kGroup = 16;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int u, int part) {
    return V::template bits<2 * i, 2>(V::words(w + 320 + 512 * u + 64 * s, part));
  }
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    return V::mask(both<j>(w, part), kBothLow4);
  }
  template <int j>
  static inline auto min(const uint8_t* w, int part) {
    return V::template shift<4>(both<j>(w, part));
  }

 private:
  template <int j>
  static inline auto both(const uint8_t* w, int part) {
    return V::template spread<2 * (j % 2), 2 * (j % 2) + 1>(V::words(w + 64 + 64 * (j / 2), part));
  }
};

// d[16], three words of ggml's packed six-bit scales, two bits of two fours of runs, third bits (bit j: run j).
template <typename V>
struct Unpack<V, WeightFormat::kQ3_K> {
  static constexpr int kMaxQuant = 7, kOffset = 4, kPeriod = 8, kGroup = 16;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int, int part) {
    return V::either(V::template bits<2 * (i % 4), 2>(V::words(w + 224 + 512 * (i / 4) + 64 * s, part)),
                     V::template bits<i, 1, 2>(V::words(w + 1248 + 64 * s, part)));
  }
  // Byte g % 8 holds the low nibbles of groups g and g + 8, byte 8 + g % 4 the top bits of every fourth group.
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    constexpr int kByte = 2 * (j % 2);
    const auto low = V::template spread<kByte, kByte + 1>(V::words(w + 32 + 64 * (j % 4 / 2), part));
    const auto top = V::template spread<kByte, kByte + 1>(V::words(w + 32 + 128, part));
    return V::less32(V::either(V::mask(V::template shift<4 * (j / 4)>(low), kBothLow4),
                               V::mask(V::template shift<2 * (j / 2) - 4>(top), kBothTop2)));
  }
};

// d[16], u16 of two top bits a run, one word of low nibbles, then every run as an IQ4_NL block without scale.
template <typename V>
struct Unpack<V, WeightFormat::kIQ4_XS> {
  static constexpr int kMaxQuant = 241, kOffset = 128, kPeriod = 1, kGroup = 32;
  template <int i, int s>
  static inline auto quants(const uint8_t* w, int u, int part) {
    return V::lookup(kIq4StepsPlus128, nibbles<V, s>(w + 128 + 256 * u, part));
  }
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    const auto low = V::template spread<j / 2, j / 2>(V::words(w + 64, part));
    const auto top = V::template spread<j / 4, j / 4>(V::halves(w + 32, part));
    return V::less32(V::either(V::mask(V::template shift<4 * (j % 2)>(low), kBothLow4),
                               V::mask(V::template shift<2 * (j % 4) - 4>(top), kBothTop2)));
  }
};

}  // namespace
}  // namespace edge
