// The loops of the neuron kernels, shared by the ISAs. Internal linkage: compiled under several flags.
//
// Records lie scattered in memory, so hardware prefetching starts anew at each: while some rows are computed, the same
// bytes of the next ones are asked for.
//
// Isa gives
//   Lanes                             8 floats, one per lane of a dot row
//   zero(), halves(p)                 Lanes of zeros, of 8 f16
//   load(p), add(a, b), mul(a, b)     Lanes of 8 floats, sum, product
//   sum(lanes)                        the horizontal sum of neuron.h
//   Quants, bytes(p), nibbles(p)      256 stored quants, from 256 bytes or from 128 bytes of pairs
//   dot_bytes, dot_nibbles(q, act)    integer dot products with an activation group, as Lanes
//   V, kWidth                         a vector of floats for columns; kWidth divides 32
//   load_v, store_v, add_v            on V
//   column_<format>(p, scale, out)    32 values of a column times scale
//   scales(p, a, out)                 8 f16 at p, times a
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/neuron.h"

namespace edge {
namespace {

constexpr int kNeuronRows = 4;   // rows, or columns, in flight at once
constexpr int kNeuronBatch = 4;  // activation rows a decoded row serves

inline const uint8_t* row_at(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }

template <int64_t kBytes>
inline void prefetch_lines(const uint8_t* p) {
#pragma GCC unroll 8
  for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(p + at);
}

// out[m * out_stride + r] of kRows rows and kX activation rows.
template <class Isa, bool kNibbles>
struct DotIntegers {
  static constexpr int64_t kGroupBytes = kNibbles ? 144 : 272;

  template <int kRows, int kX>
  static inline void run(const uint8_t* const* rows, const uint8_t* const* next, int64_t n_groups,
                         const std::byte* acts, int64_t act_stride, float* out, int64_t out_stride) {
    typename Isa::Lanes acc[kRows][kX];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < kX; ++m) acc[r][m] = Isa::zero();
    for (int64_t g = 0; g < n_groups; ++g) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        prefetch_lines<kGroupBytes>(next[r] + g * kGroupBytes);
        const uint8_t* group = rows[r] + g * kGroupBytes;
        const typename Isa::Lanes d = Isa::halves(group);
        const typename Isa::Quants quants = kNibbles ? Isa::nibbles(group + 16) : Isa::bytes(group + 16);
#pragma GCC unroll 4
        for (int m = 0; m < kX; ++m) {
          const auto& act = reinterpret_cast<const NeuronActGroup*>(acts + m * act_stride)[g];
          const typename Isa::Lanes dot = kNibbles ? Isa::dot_nibbles(quants, act) : Isa::dot_bytes(quants, act);
          acc[r][m] = Isa::add(acc[r][m], Isa::mul(Isa::mul(d, Isa::load(act.d)), dot));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < kX; ++m) out[m * out_stride + r] = Isa::sum(acc[r][m]);
  }
};

template <class Isa>
using DotBytes = DotIntegers<Isa, false>;
template <class Isa>
using DotNibbles = DotIntegers<Isa, true>;

template <class Isa>
struct DotHalves {
  template <int kRows, int kX>
  static inline void run(const uint8_t* const* rows, const uint8_t* const* next, int64_t n_groups,
                         const std::byte* acts, int64_t act_stride, float* out, int64_t out_stride) {
    typename Isa::Lanes acc[kRows][kX];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < kX; ++m) acc[r][m] = Isa::zero();
    // A line of a row (32 values) at a time.
    for (int64_t at = 0; at < n_groups * kNeuronGroupValues; at += 32) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + 2 * at);
#pragma GCC unroll 4
      for (int j = 0; j < 32; j += 8) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const typename Isa::Lanes w = Isa::halves(rows[r] + 2 * (at + j));
#pragma GCC unroll 4
          for (int m = 0; m < kX; ++m) {
            const auto* x = reinterpret_cast<const float*>(acts + m * act_stride) + at + j;
            acc[r][m] = Isa::add(acc[r][m], Isa::mul(w, Isa::load(x)));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < kX; ++m) out[m * out_stride + r] = Isa::sum(acc[r][m]);
  }
};

// kRows rows, all activation rows.
template <class Dot, int kRows>
inline void dot_rows(const uint8_t* const* rows, const uint8_t* const* next, int64_t n_groups, const std::byte* acts,
                     int64_t act_stride, int64_t n_x, float* out, int64_t out_stride) {
  const auto some = [&]<int kX>(int64_t m) {
    // Only the first activations wait for memory.
    Dot::template run<kRows, kX>(rows, m == 0 ? next : rows, n_groups, acts + m * act_stride, act_stride,
                                 out + m * out_stride, out_stride);
  };
  int64_t m = 0;
  for (; m + kNeuronBatch <= n_x; m += kNeuronBatch) some.template operator()<kNeuronBatch>(m);
  switch (n_x - m) {
    case 1: some.template operator()<1>(m); break;
    case 2: some.template operator()<2>(m); break;
    case 3: some.template operator()<3>(m); break;
    default: break;
  }
}

// One activation row: several rows at once hide each other's latency. More: the activations do.
template <class Dot>
inline void run_dot(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts, int64_t act_stride,
                    int64_t n_x, float* out, int64_t out_stride) {
  const int64_t n_groups = neuron_groups(hidden);
  const int64_t step = n_x == 1 ? kNeuronRows : 1;
  for (int64_t i = 0; i < n; i += step) {
    const uint8_t* now[kNeuronRows];
    const uint8_t* next[kNeuronRows];
    for (int64_t r = 0; r < step; ++r) {
      now[r] = row_at(rows[std::min(i + r, n - 1)]);
      next[r] = row_at(rows[std::min(i + step + r, n - 1)]);
    }
    if (step == kNeuronRows && i + kNeuronRows <= n) {
      dot_rows<Dot, kNeuronRows>(now, next, n_groups, acts, act_stride, n_x, out + i, out_stride);
      continue;
    }
    for (int64_t r = 0; r < std::min(step, n - i); ++r) {
      dot_rows<Dot, 1>(now + r, next + r, n_groups, acts, act_stride, n_x, out + i + r, out_stride);
    }
  }
}

// How 32 values of a column lie in it, and what they are multiplied with.
template <class Isa, int kFormat>
struct Column {
  static constexpr int64_t kGroupBytes = kNeuronTraits[kFormat].group_bytes;
  static constexpr bool kScaled = kFormat != 0;
  static constexpr int64_t kScaleBytes = kScaled ? 16 : 0;
  static constexpr int64_t kBlockBytes = (kGroupBytes - kScaleBytes) / 8;
  static constexpr int kVectors = 32 / Isa::kWidth;
  using V = typename Isa::V;

  static inline void products(const uint8_t* block, float scale, V (&out)[kVectors]) {
    if constexpr (kFormat == 0) Isa::column_f16(block, scale, out);
    if constexpr (kFormat == 1) Isa::column_q8(block, scale, out);
    if constexpr (kFormat == 2) Isa::column_q4(block, scale, out);
  }

  // out[j] += columns 0, 1 ... kRows - 1 in this order.
  template <int kRows>
  static inline void add(const uint8_t* const* cols, const float* a, const uint8_t* const* next, int64_t begin,
                         int64_t end, float* out) {
    for (int64_t j = begin; j < end;) {
      const int64_t group = j / kNeuronGroupValues;
      const int64_t at = group * kGroupBytes;
      const int64_t last = std::min(end, (group + 1) * kNeuronGroupValues);
      float scale[kRows][8];
      if constexpr (kScaled) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) Isa::scales(cols[r] + at, a[r], scale[r]);
      }
      for (; j < last; j += 32) {
        const int64_t block = j % kNeuronGroupValues / 32;
        const int64_t from = at + kScaleBytes + block * kBlockBytes;
        V sums[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[v] = Isa::load_v(out + j + v * Isa::kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          __builtin_prefetch(next[r] + from);
          V product[kVectors];
          products(cols[r] + from, kScaled ? scale[r][block] : a[r], product);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sums[v] = Isa::add_v(sums[v], product[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) Isa::store_v(out + j + v * Isa::kWidth, sums[v]);
      }
    }
  }
};

template <class Isa>
using ColumnF16 = Column<Isa, 0>;
template <class Isa>
using ColumnQ8 = Column<Isa, 1>;
template <class Isa>
using ColumnQ4 = Column<Isa, 2>;

// The columns whose factor is not zero, kNeuronRows at a time.
struct ColumnQueue {
  const std::byte* const* cols;
  const float* a;
  int64_t n;
  int64_t i = 0;

  struct Some {
    const uint8_t* col[kNeuronRows];
    float a[kNeuronRows];
    int n = 0;
  };

  inline Some take() {
    Some some;
    for (; i < n && some.n < kNeuronRows; ++i) {
      if (a[i] == 0.0f) continue;
      some.col[some.n] = row_at(cols[i]);
      some.a[some.n++] = a[i];
    }
    for (int r = some.n; r < kNeuronRows; ++r) some.col[r] = some.n > 0 ? some.col[0] : nullptr;
    return some;
  }
};

template <class Columns>
inline void run_axpy(const std::byte* const* cols, const float* a, int64_t n, int64_t begin, int64_t end, float* out) {
  ColumnQueue queue{cols, a, n};
  for (ColumnQueue::Some now = queue.take(); now.n > 0;) {
    const ColumnQueue::Some next = queue.take();
    const uint8_t* const* ahead = next.n > 0 ? next.col : now.col;
    switch (now.n) {
      case 1: Columns::template add<1>(now.col, now.a, ahead, begin, end, out); break;
      case 2: Columns::template add<2>(now.col, now.a, ahead, begin, end, out); break;
      case 3: Columns::template add<3>(now.col, now.a, ahead, begin, end, out); break;
      default: Columns::template add<kNeuronRows>(now.col, now.a, ahead, begin, end, out); break;
    }
    now = next;
  }
}

}  // namespace

// The functions of neuron_table.h for one ISA.
#define EDGE_NEURON_DOT(format, isa, dot)                                                                          \
  void neuron_dot_##format##_##isa(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts, \
                                   int64_t act_stride, int64_t n_x, float* out, int64_t out_stride) {              \
    run_dot<dot>(rows, n, hidden, acts, act_stride, n_x, out, out_stride);                                         \
  }
#define EDGE_NEURON_AXPY(format, isa, columns)                                                                  \
  void neuron_axpy_##format##_##isa(const std::byte* const* cols, const float* a, int64_t n, int64_t begin,     \
                                    int64_t end, float* out) {                                                  \
    run_axpy<columns>(cols, a, n, begin, end, out);                                                             \
  }
// What every ISA does alike, and all of it.
#define EDGE_NEURON_SHARED(isa, Isa)                                          \
  EDGE_NEURON_DOT(f16, isa, DotHalves<Isa>)                                   \
  EDGE_NEURON_AXPY(f16, isa, ColumnF16<Isa>)                                  \
  EDGE_NEURON_AXPY(q8, isa, ColumnQ8<Isa>)                                    \
  EDGE_NEURON_AXPY(q4, isa, ColumnQ4<Isa>)                                    \
  void neuron_act_f16_##isa(const float* x, int64_t hidden, std::byte* act) { \
    neuron_act_f16(x, hidden, act);                                           \
  }                                                                           \
  void neuron_act_q8_##isa(const float* x, int64_t hidden, std::byte* act) {  \
    neuron_act_q8<quantize_q8x32_##isa>(x, hidden, act);                      \
  }
#define EDGE_NEURON_KERNELS(isa, Isa)       \
  EDGE_NEURON_DOT(q8, isa, DotBytes<Isa>)   \
  EDGE_NEURON_DOT(q4, isa, DotNibbles<Isa>) \
  EDGE_NEURON_SHARED(isa, Isa)

}  // namespace edge
