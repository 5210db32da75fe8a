// Attention over tiles, one definition for all ISAs:
//
//   score = ((float(dot(q, k)) * k_scale) * q_scale), q and k integers
//   p = e^(score - max of the segment); weight = round(p * v_scale * 32767 / max of p * v_scale)
//   segment = float(sum of weight * v) * (what a weight is worth), the sum exact
//   out, sum <- out * e^(old max - new max) + segment * e^(its max - new max), segment after segment
//
// Integer sums have no order; float steps are those of ops_impl.h. An ISA gives the two integer products:
//   key_dots<type, heads>(k, q, padded, q_sums, out): out[h][16 tokens] = dot(q[h], k[token])
//   value_dots<type, heads>(a, head, dim): a.sums[head..][dim .. dim + 32) += weights * values over all tiles
#pragma once

#include "kernels/ops_impl.h"

namespace edge::ops {

inline constexpr float kMaxWeight = 32767.0f;
inline constexpr int64_t kPrefetchBytes = 64;

// What happens to the sums so far, and to those of a segment, when it is taken in.
template <class Isa>
struct Merge {
  float old, add;

  Merge(const SegmentSum& segment, AttentionState* state) {
    const float max = state->max < segment.max ? segment.max : state->max;
    old = exp_of(state->max - max);
    add = exp_of(segment.max - max);
    state->max = max;
    state->sum = state->sum * old + segment.sum * add;
  }
  static float exp_of(float x) { return exp_part<Isa>(splat<Isa>(x))[0]; }
};

// Keys and values of f16 as a segment: the scores and sums of ops_attention.h, weights left as they are.
template <class Isa>
void add_rows(const AttentionArgs& args, AttentionState* states, float* out, int64_t padded) {
  using O = Ops<Isa>;
  using A = Attention<Isa>;
  AttentionArgs a = args;
  a.first = 0;
  a.n = a.n_visible;
  A::begin(a);
  A::scores(a);
  for (int64_t h = 0; h < a.group; ++h) {
    float* const scores = a.scores + h * a.stride;
    SegmentSum segment;
    segment.max = *scores;
    for (int64_t i = 1; i < a.n; ++i) segment.max = segment.max < scores[i] ? scores[i] : segment.max;
    const V16<Isa> max = splat16<Isa>(segment.max);
    O::map(a.n, scores, [&](const V16<Isa>& v) { return exp<Isa>(v - max); }, scores);
    segment.sum = O::sum(scores, a.n, 0, [](const V16<Isa>& v) { return v; });
    const Merge<Isa> by(segment, states + h);
    float* const so_far = out + h * padded;
    O::map(a.head_dim, so_far, [&](const V16<Isa>& v) { return v * splat16<Isa>(by.old); }, so_far);
    O::map(a.n, scores, [&](const V16<Isa>& v) { return v * splat16<Isa>(by.add); }, scores);
  }
  for (int64_t i = 0; i < a.group * a.head_dim; ++i) a.out[i] = 0;
  A::values(a);
  for (int64_t h = 0; h < a.group; ++h) O::add(a.out + h * a.head_dim, a.head_dim, out + h * padded);
}

template <class Isa, KvType kType>
struct Tiles {
  using V = V16<Isa>;
  using Vec = typename Isa::Vec;
  using IVec = typename Isa::IVec;

  static V from_ints(const int32_t* p) {
    V v;
    for (int i = 0; i < V::kParts; ++i) {
      IVec ints;
      __builtin_memcpy(&ints, p + i * Isa::kLanes, sizeof ints);
      v.part[i] = __builtin_convertvector(ints, Vec);
    }
    return v;
  }

  static void prefetch(const std::byte* tile, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kPrefetchBytes) __builtin_prefetch(tile + at);
  }

  template <int kHeads>
  static void score_heads(const TileArgs& a, int64_t head, const std::byte* tile, const V& scale, int64_t key) {
    const int64_t padded = a.layout.padded();
    for (; head + kHeads <= a.group; head += kHeads) {
      alignas(64) int32_t dots[kHeads][16];
      Isa::template key_dots<kType, kHeads>(reinterpret_cast<const uint8_t*>(tile), a.q + head * padded, padded,
                                            a.q_sums + head, dots);
      for (int h = 0; h < kHeads; ++h) {
        store(a.scores + (head + h) * a.stride + key, from_ints(dots[h]) * scale * splat16<Isa>(a.q_scales[head + h]));
      }
    }
    if constexpr (kHeads > 1) score_heads<kHeads / 2>(a, head, tile, scale, key);
  }

  static void scores(const TileArgs& a) {
    for (int64_t tile = 0; tile < a.n_tiles; ++tile) {
      const std::byte* data = a.tiles[tile];
      if (tile + 1 < a.n_tiles) prefetch(a.tiles[tile + 1], a.layout.bytes());
      const int64_t key = tile * kKvTileTokens;
      const V scale = load_f16<Isa>(reinterpret_cast<const uint16_t*>(data + a.layout.key_scales()));
      store(a.value_scales + key, load_f16<Isa>(reinterpret_cast<const uint16_t*>(data + a.layout.value_scales())));
      score_heads<Isa::kKeyHeads>(a, 0, data, scale, key);
      if (a.first > key || a.end < key + kKvTileTokens) hide(a, key);
    }
  }

  static void hide(const TileArgs& a, int64_t key) {
    for (int64_t i = key; i < key + kKvTileTokens; ++i) {
      if (i >= a.first && i < a.end) continue;
      a.value_scales[i] = 0;
      for (int64_t h = 0; h < a.group; ++h) a.scores[h * a.stride + i] = -__builtin_inff();
    }
  }

  static V larger(const V& a, const V& b) {
    V v;
    for (int i = 0; i < V::kParts; ++i) v.part[i] = a.part[i] < b.part[i] ? b.part[i] : a.part[i];
    return v;
  }
  static V magnitude(const V& a) { return larger(a, splat16<Isa>(0) - a); }

  static SegmentSum weigh(float* scores, int64_t n, const float* value_scales) {
    SegmentSum segment;
    V top = splat16<Isa>(-__builtin_inff());
    for (int64_t i = 0; i < n; i += 16) top = larger(top, load<Isa>(scores + i));
    segment.max = max_lanes(top);
    const V max = splat16<Isa>(segment.max);
    V total = splat16<Isa>(0), largest = splat16<Isa>(0);
    for (int64_t i = 0; i < n; i += 16) {
      const V p = exp<Isa>(load<Isa>(scores + i) - max);
      const V weight = p * load<Isa>(value_scales + i);
      total = total + p;
      largest = larger(largest, magnitude(weight));
      store(scores + i, weight);
    }
    segment.sum = sum_lanes(total);
    const float most = max_lanes(largest);
    const float inverse = kMaxWeight / most;
    // Nothing but zeros, or values too small for the division.
    const bool none = !(inverse <= 3.0e38f);
    segment.weight = none ? 0 : most / kMaxWeight;
    round_weights(scores, n, none ? 0 : inverse);
    return segment;
  }

  // In place: 16 integers take half the room of the floats they were.
  static void round_weights(float* weights, int64_t n, float inverse) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the integer sits in the low bits
    const V factor = splat16<Isa>(inverse), rounder = splat16<Isa>(kRounder);
    for (int64_t i = 0; i < n; i += 16) {
      const V shifted = load<Isa>(weights + i) * factor + rounder;
      alignas(64) int32_t bits[16];
      __builtin_memcpy(bits, &shifted, sizeof bits);
      alignas(32) int16_t rounded[16];
      for (int j = 0; j < 16; ++j) rounded[j] = static_cast<int16_t>(bits[j] - 0x4b400000);
      __builtin_memcpy(reinterpret_cast<std::byte*>(weights) + 2 * i, rounded, sizeof rounded);
    }
  }

  template <int kHeads>
  static void value_heads(const TileArgs& a, int64_t head) {
    for (; head + kHeads <= a.group; head += kHeads) {
      for (int64_t dim = 0; dim < a.layout.padded(); dim += 32) Isa::template value_dots<kType, kHeads>(a, head, dim);
    }
    if constexpr (kHeads > 1) value_heads<kHeads / 2>(a, head);
  }

  static void values(const TileArgs& a) { value_heads<Isa::kValueHeads>(a, 0); }

  static void merge(const SegmentSum& segment, const int32_t* sums, int64_t padded, AttentionState* state, float* out) {
    const Merge<Isa> by(segment, state);
    const V keep = splat16<Isa>(by.old), worth = splat16<Isa>(segment.weight * by.add);
    for (int64_t d = 0; d < padded; d += 16) store(out + d, load<Isa>(out + d) * keep + from_ints(sums + d) * worth);
  }

  static constexpr TileKernels table() { return {scores, weigh, values, merge}; }
};

template <class Isa>
constexpr TileTable make_tile_table() {
  return {{Tiles<Isa, KvType::kInt8>::table(), Tiles<Isa, KvType::kInt4>::table()}, add_rows<Isa>};
}

}  // namespace edge::ops
