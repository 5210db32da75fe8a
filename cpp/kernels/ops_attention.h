// Attention over one KV head, for the group of query heads that share it: of one query position, or of several over the
// keys that all of them see.
//
// scores[h, i] = scale * dot(f16(q[h]), k[i]): 16 lane sums over the dims in order, folded as sum_lanes does.
// p = f16(softmax(scores)) over the visible keys; out[h, d] = sum of p[h, i] * v[i][d] in the order of i.
// Queries and weights are rounded to the f16 that keys and values have, as ggml does: the same tokens from the same file
// are worth more than the error, which is no larger than that of the keys and values themselves.
// Blocks of keys keep a piece of K or V in the first-level cache while all heads use it; no result depends on them.
// A score depends on its key alone, and sums over values go through `out` from key to key: so scores and values may be
// computed over ranges of keys, as those arrive from a drive, with the bits of one range over all of them.
#pragma once

#include "kernels/ops_impl.h"

namespace edge::ops {

inline constexpr int64_t kPrefetchRows = 8;   // far enough ahead to cover a memory access, a few KiB in flight
inline constexpr int64_t kValueBlock = 64;    // rows of V per block: 16 KiB at head_dim 128

template <class Isa>
struct Attention {
  using Vec = typename Isa::Vec;
  using V = V16<Isa>;
  static constexpr int64_t kLanes = Isa::kLanes;
  static constexpr int kQuadKeys = Isa::kLanes / 4;  // see sum_quads

  static void prefetch_row(const uint16_t* row, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 32) __builtin_prefetch(row + d);
  }

  // Sums of kHeads queries over kKeys keys into quads[4 h], as sum_quads has them: a key becomes floats once for all
  // queries, and a query is loaded once for all keys. kTail: head_dim is no multiple of 16.
  template <int kHeads, int kKeys, bool kTail>
  static void dots(const AttentionArgs& a, const float* q, const uint16_t* const* keys, Vec* quads) {
    const int64_t whole = a.head_dim / 16 * 16, tail = a.head_dim - whole;
    V sums[kHeads][kQuadKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kHeads * kQuadKeys; ++i) sums[i / kQuadKeys][i % kQuadKeys] = splat16<Isa>(0);
    const auto add = [&](const auto& key_at, const auto& query_at) __attribute__((always_inline)) {
      V k[kKeys];
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) k[j] = key_at(keys[j]);
#pragma GCC unroll 16
      for (int i = 0; i < kHeads * kKeys; ++i) {
        V& sum = sums[i / kKeys][i % kKeys];
        sum = sum + query_at(q + i / kKeys * a.head_dim) * k[i % kKeys];
      }
    };
    for (int64_t d = 0; d < whole; d += 16) {
      add([&](const uint16_t* key) { return load_f16<Isa>(key + d); }, [&](const float* x) { return load<Isa>(x + d); });
    }
    if constexpr (kTail) {
      add([&](const uint16_t* key) { return load_f16_tail<Isa>(key + whole, tail); },
          [&](const float* x) { return load_tail<Isa>(x + whole, tail); });
    }
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) quads[4 * h] = sum_quads<Isa>(sums[h]);
  }

  // The same over n <= kKeys keys, whatever their number.
  template <int kHeads, int kKeys, bool kTail>
  static void dots_of(const AttentionArgs& a, const float* q, const uint16_t* const* keys, int n, Vec* quads) {
    if (n == kKeys) return dots<kHeads, kKeys, kTail>(a, q, keys, quads);
    if constexpr (kKeys > 1) return dots_of<kHeads, kKeys - 1, kTail>(a, q, keys, n, quads);
    for (int h = 0; h < kHeads; ++h) quads[4 * h] = splat<Isa>(0);
  }

  // Scores of kHeads heads over `n` <= kLanes keys of the range.
  template <int kHeads, bool kTail>
  static void score(const AttentionArgs& a, int64_t head, int64_t key, int64_t n) {
    const float* const q = a.out + head * a.head_dim;  // rounded, see begin()
    Vec quads[4 * kHeads];
    for (int i = 0; i < 4; ++i) {
      const uint16_t* keys[kQuadKeys];
      int n_keys = 0;
      for (int64_t j = i; j < n; j += 4) keys[n_keys++] = a.k[key + j] + a.k_at;
      dots_of<kHeads, kQuadKeys, kTail>(a, q, keys, n_keys, quads + i);
    }
    for (int h = 0; h < kHeads; ++h) {
      const Vec scores = sum_each<Isa>(quads + 4 * h) * a.scale;
      float* out = a.scores + (head + h) * a.stride + a.first + key;
      if (n == kLanes) {
        __builtin_memcpy(out, &scores, sizeof scores);
      } else {
        for (int64_t j = 0; j < n; ++j) out[j] = scores[j];
      }
    }
  }

  // Heads [head, group) over one block of keys, kHeads at a time, the rest with smaller tiles.
  template <int kHeads, bool kTail>
  static void score_heads(const AttentionArgs& a, int64_t head, int64_t key, int64_t n) {
    for (; head + kHeads <= a.group; head += kHeads) score<kHeads, kTail>(a, head, key, n);
    if constexpr (kHeads > 1) score_heads<kHeads / 2, kTail>(a, head, key, n);
  }

  // out[kHeads, 16 * kChunks dims from `dim`] += p * v over keys [key, end) of the range.
  template <int kHeads, int kChunks>
  static void accumulate(const AttentionArgs& a, int64_t head, int64_t dim, int64_t key, int64_t end) {
    V sums[kHeads][kChunks];
    float* out = a.out + head * a.head_dim + dim;
    const float* p = a.scores + head * a.stride + a.first;
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kChunks; ++c) sums[h][c] = load<Isa>(out + h * a.head_dim + c * 16);
    }
    for (int64_t i = key; i < end; ++i) {
      const uint16_t* row = a.v[i] + a.v_at + dim;
      V v[kChunks];
      for (int c = 0; c < kChunks; ++c) v[c] = load_f16<Isa>(row + c * 16);
      for (int h = 0; h < kHeads; ++h) {
        const V weight = splat16<Isa>(p[h * a.stride + i]);
        for (int c = 0; c < kChunks; ++c) sums[h][c] = sums[h][c] + weight * v[c];
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kChunks; ++c) store(out + h * a.head_dim + c * 16, sums[h][c]);
    }
  }

  // The last head_dim % 16 dims of one head.
  static void accumulate_tail(const AttentionArgs& a, int64_t head, int64_t dim, int64_t key, int64_t end) {
    float* out = a.out + head * a.head_dim + dim;
    const float* p = a.scores + head * a.stride + a.first;
    const int64_t n = a.head_dim - dim;
    V sum = load_tail<Isa>(out, n);
    for (int64_t i = key; i < end; ++i) {
      sum = sum + splat16<Isa>(p[i]) * load_f16_tail<Isa>(a.v[i] + a.v_at + dim, n);
    }
    store_tail(out, n, sum);
  }

  template <int kHeads>
  static void accumulate_heads(const AttentionArgs& a, int64_t head, int64_t key, int64_t end) {
    constexpr int kChunks = Isa::kValueSums / kHeads < Isa::kValueChunks ? Isa::kValueSums / kHeads : Isa::kValueChunks;
    for (; head + kHeads <= a.group; head += kHeads) {
      int64_t dim = 0;
      for (; dim + 16 * kChunks <= a.head_dim; dim += 16 * kChunks) {
        accumulate<kHeads, kChunks>(a, head, dim, key, end);
      }
      for (; dim + 16 <= a.head_dim; dim += 16) accumulate<kHeads, 1>(a, head, dim, key, end);
      if (dim < a.head_dim) {
        for (int h = 0; h < kHeads; ++h) accumulate_tail(a, head + h, dim, key, end);
      }
    }
    if constexpr (kHeads > 1) accumulate_heads<kHeads / 2>(a, head, key, end);
  }

  // The output is written only after the scores are known; until then it holds the rounded queries.
  static void begin(const AttentionArgs& a) { Ops<Isa>::round_f16(a.q, a.group * a.head_dim, a.out); }

  static void scores(const AttentionArgs& a) {
    for (int64_t key = 0; key < a.n; key += kLanes) {
      const int64_t n = a.n - key < kLanes ? a.n - key : kLanes;
      for (int64_t i = key + kPrefetchRows; i < key + kPrefetchRows + n && i < a.n; ++i) {
        prefetch_row(a.k[i] + a.k_at, a.head_dim);
      }
      if (a.head_dim % 16 == 0) {
        score_heads<Isa::kScoreHeads, false>(a, 0, key, n);
      } else {
        score_heads<1, true>(a, 0, key, n);
      }
    }
  }

  static void weigh(const AttentionArgs& a) {
    for (int64_t h = 0; h < a.group; ++h) Ops<Isa>::softmax_f16(a.scores + h * a.stride, a.n_visible);
    for (int64_t i = 0; i < a.group * a.head_dim; ++i) a.out[i] = 0;
  }

  static void values(const AttentionArgs& a) {
    for (int64_t key = 0; key < a.n; key += kValueBlock) {
      const int64_t end = key + kValueBlock < a.n ? key + kValueBlock : a.n;
      for (int64_t i = end; i < end + kValueBlock && i < a.n; ++i) prefetch_row(a.v[i] + a.v_at, a.head_dim);
      accumulate_heads<Isa::kValueHeads>(a, 0, key, end);
    }
  }
};

}  // namespace edge::ops
