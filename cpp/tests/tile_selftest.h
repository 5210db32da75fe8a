// Attention over tiles of one ISA against ref: what kernel_selftest runs beside the matrix products.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"

namespace edge {

struct TileCase {
  KvTileLayout layout;
  int64_t group = 0, n_tiles = 0, first = 0, end = 0;
  std::vector<int8_t> q;
  std::vector<float> q_scales;
  std::vector<int32_t> q_sums;
  std::vector<std::byte> keys, values;
};

// Every byte is a pair of quants; scales are ordinary, zero, subnormal or large.
template <typename Random, typename RandomHalf>
TileCase random_tiles_case(Random& random, RandomHalf random_half, KvType type) {
  TileCase made;
  made.layout = {type, 1 + random.below(140)};
  made.group = 1 + random.below(11);
  made.n_tiles = 1 + random.below(kKvSegment / kKvTileTokens);
  made.end = 1 + random.below(made.n_tiles * kKvTileTokens);
  made.first = random.below(3) == 0 ? random.below(made.end) : 0;
  const int64_t padded = made.layout.padded();
  for (int64_t h = 0; h < made.group; ++h) {
    int32_t sum = 0;
    for (int64_t d = 0; d < padded; ++d) {
      made.q.push_back(static_cast<int8_t>(random.below(255) - 127));
      sum += made.q.back();
    }
    made.q_sums.push_back(sum);
    made.q_scales.push_back(random.symmetric() * 0.001f);
  }
  const int64_t fill = random.below(4);  // 0: all quants at one end, else random
  for (std::vector<std::byte>* tiles : {&made.keys, &made.values}) {
    tiles->resize(static_cast<size_t>(made.n_tiles * made.layout.bytes()));
    for (std::byte& byte : *tiles) byte = fill == 0 ? std::byte{0x81} : static_cast<std::byte>(random.next());
  }
  if (type == KvType::kInt8) {  // -128 is never stored
    for (std::vector<std::byte>* tiles : {&made.keys, &made.values}) {
      for (std::byte& byte : *tiles) byte = byte == std::byte{0x80} ? std::byte{0x81} : byte;
    }
  }
  for (int64_t tile = 0; tile < made.n_tiles; ++tile) {
    for (int64_t i = 0; i < 2 * kKvTileTokens; ++i) {
      const uint16_t half = random.below(8) == 0 ? random_half(random) : static_cast<uint16_t>(0x2800 + random.below(0x800));
      std::memcpy(made.keys.data() + tile * made.layout.bytes() + made.layout.key_scales() + 2 * i, &half, 2);
    }
  }
  return made;
}

// Two segments of the same keys, one after the other: [group][max, sum, out [padded]].
inline std::vector<float> attend_tiles(const Kernels& kernels, const TileCase& given) {
  const TileKernels& steps = kernels.tiles.of(given.layout.type);
  const int64_t n = given.n_tiles * kKvTileTokens, padded = given.layout.padded();
  std::vector<const std::byte*> keys, values;
  for (int64_t i = 0; i < given.n_tiles; ++i) {
    keys.push_back(given.keys.data() + i * given.layout.bytes());
    values.push_back(given.values.data() + i * given.layout.bytes());
  }
  std::vector<float> scores(static_cast<size_t>(given.group * n)), value_scales(static_cast<size_t>(n));
  TileArgs a;
  a.q = given.q.data();
  a.q_scales = given.q_scales.data();
  a.q_sums = given.q_sums.data();
  a.group = given.group;
  a.layout = given.layout;
  a.n_tiles = given.n_tiles;
  a.first = given.first;
  a.end = given.end;
  a.scores = scores.data();
  a.value_scales = value_scales.data();
  a.stride = n;
  std::vector<AttentionState> states(static_cast<size_t>(given.group));
  std::vector<float> out(static_cast<size_t>(given.group * padded));
  for (int round = 0; round < 2; ++round) {
    a.tiles = keys.data();
    steps.scores(a);
    std::vector<SegmentSum> found;
    for (int64_t h = 0; h < given.group; ++h) found.push_back(steps.weigh(scores.data() + h * n, n, value_scales.data()));
    std::vector<int32_t> sums(static_cast<size_t>(given.group * padded));
    a.tiles = values.data();
    a.weights = reinterpret_cast<const int16_t*>(scores.data());
    a.weight_stride = 2 * n;
    a.sums = sums.data();
    steps.values(a);
    for (int64_t h = 0; h < given.group; ++h) {
      steps.merge(found[static_cast<size_t>(h)], sums.data() + h * padded, padded, &states[static_cast<size_t>(h)],
                  out.data() + h * padded);
    }
  }
  for (const AttentionState& state : states) out.insert(out.end(), {state.max, state.sum});
  return out;
}

// One random case; the number of kernels that differ.
template <typename Random, typename RandomHalf>
int compare_tiles(const Kernels& ref, const Kernels& isa, KvType type, Random& random, RandomHalf random_half) {
  const TileCase given = random_tiles_case(random, random_half, type);
  const std::vector<float> expected = attend_tiles(ref, given), found = attend_tiles(isa, given);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&expected[i], &found[i], 4) == 0 || (expected[i] != expected[i] && found[i] != found[i])) continue;
    std::printf("%s: attention over %s, head_dim=%lld group=%lld keys=%lld: out[%zu] is %a, ref has %a\n", isa.isa,
                type == KvType::kInt8 ? "int8" : "int4", static_cast<long long>(given.layout.head_dim),
                static_cast<long long>(given.group), static_cast<long long>(given.end), i,
                static_cast<double>(found[i]), static_cast<double>(expected[i]));
    return 1;
  }
  return 0;
}

}  // namespace edge
