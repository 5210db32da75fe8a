// Dot products of neuron rows of integers in 512 bits: four rows share two registers from the integer sums on, and
// sixteen outputs one horizontal sum. Included by neuron_avx512vnni.cc alone.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/neuron_driver.h"

namespace edge {
namespace {

// Four rows and an activation row, over some groups: [row 0 | row 1] and [row 2 | row 3], eight lanes each.
struct Quad {
  __m512 front = _mm512_setzero_ps(), back = _mm512_setzero_ps();
};

// What an activation group gives to every row.
struct ZmmAct {
  __m512i offset;  // minus 8 or 128 times its lanes' sums; zeros behind
  __m512 d;        // twice
  const int8_t* q;

  template <int kOffsetBits>
  static inline ZmmAct of(const NeuronActGroup& act) {
    const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(act.sum));
    const __m256i offset = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, kOffsetBits));
    return {_mm512_zextsi256_si512(offset), _mm512_broadcast_f32x8(_mm256_loadu_ps(act.d)), act.q};
  }
};

template <bool kNibbles>
struct ZmmDot {
  static constexpr int64_t kGroupBytes = kNibbles ? 144 : 272;
  static constexpr int kOffsetBits = kNibbles ? 3 : 7;
  static constexpr int kRows = 4;   // of a quad
  static constexpr int kQuads = 4;  // that share a horizontal sum

  // A group of four rows: a register of quants holds two steps of the eight lanes.
  struct Group {
    __m512i q[kRows][4];
    __m512 front_d, back_d;
  };

  static inline void quants(const uint8_t* p, __m512i (&q)[4]) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int s = 0; s < (kNibbles ? 2 : 4); ++s) {
      const __m512i some = _mm512_loadu_si512(p + 64 * s);
      q[s] = kNibbles ? _mm512_and_si512(some, mask) : some;
      if (kNibbles) q[2 + s] = _mm512_and_si512(_mm512_srli_epi16(some, 4), mask);
    }
  }

  static inline __m512 scales(const uint8_t* front, const uint8_t* back) {
    const __m256i both = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(front))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(back)), 1);
    return _mm512_cvtph_ps(both);
  }

  static inline Group load(const uint8_t* const* rows, int64_t at) {
    Group group;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) quants(rows[r] + at + 16, group.q[r]);
    group.front_d = scales(rows[0] + at, rows[1] + at);
    group.back_d = scales(rows[2] + at, rows[3] + at);
    return group;
  }

  static inline __m512i integers(const __m512i (&q)[4], const ZmmAct& act) {
    __m512i sum = act.offset;
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sum = _mm512_dpbusd_epi32(sum, q[s], _mm512_loadu_si512(act.q + 64 * s));
    return sum;
  }

  // Adds the halves of both rows: whose lanes are a row's afterwards.
  static inline __m512 values(__m512i front, __m512i back, __m512 d) {
    const __m512i low = _mm512_shuffle_i64x2(front, back, 0x44), high = _mm512_shuffle_i64x2(front, back, 0xee);
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_add_epi32(low, high)));
  }

  static inline void add(const Group& group, const ZmmAct& act, Quad& quad) {
    const __m512 front = values(integers(group.q[0], act), integers(group.q[1], act), _mm512_mul_ps(group.front_d, act.d));
    const __m512 back = values(integers(group.q[2], act), integers(group.q[3], act), _mm512_mul_ps(group.back_d, act.d));
    quad.front = _mm512_add_ps(quad.front, front);
    quad.back = _mm512_add_ps(quad.back, back);
  }

  // The horizontal sums of neuron.h: quad q's row r at 4 q + r.
  static inline __m512 sums(const Quad (&quads)[kQuads]) {
    __m512 four[kQuads];  // a row in each quarter: lanes i and i + 4 added
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) {
      four[q] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[q].front, quads[q].back, 0x88),
                              _mm512_shuffle_f32x4(quads[q].front, quads[q].back, 0xdd));
    }
    const auto pairs = [](__m512 a, __m512 b) {
      const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
      return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    };
    const __m512 a = pairs(four[0], four[1]), b = pairs(four[2], four[3]);
    const __m512 by_row = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    const __m512i by_quad = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(by_quad, by_row);
  }

  static inline void prefetch(const uint8_t* const* next, int64_t at) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) prefetch_lines<kGroupBytes>(next[r] + at);
  }

  // kN quads of rows, one activation row.
  template <int kN>
  static inline __m512 row_quads(const uint8_t* const* rows, const uint8_t* const* next, int64_t n_groups,
                                 const NeuronActGroup* acts) {
    Quad quads[kQuads];
    for (int64_t g = 0; g < n_groups; ++g) {
      const ZmmAct act = ZmmAct::of<kOffsetBits>(acts[g]);
#pragma GCC unroll 4
      for (int q = 0; q < kN; ++q) {
        prefetch(next + kRows * q, g * kGroupBytes);
        add(load(rows + kRows * q, g * kGroupBytes), act, quads[q]);
      }
    }
    return sums(quads);
  }

  // A quad of rows, kN activation rows.
  template <int kN>
  static inline __m512 act_quads(const uint8_t* const* rows, const uint8_t* const* next, int64_t n_groups,
                                 const std::byte* acts, int64_t act_stride) {
    Quad quads[kQuads];
    for (int64_t g = 0; g < n_groups; ++g) {
      prefetch(next, g * kGroupBytes);
      const Group group = load(rows, g * kGroupBytes);
#pragma GCC unroll 4
      for (int m = 0; m < kN; ++m) {
        const auto& act = reinterpret_cast<const NeuronActGroup*>(acts + m * act_stride)[g];
        add(group, ZmmAct::of<kOffsetBits>(act), quads[m]);
      }
    }
    return sums(quads);
  }

  static void one(const std::byte* const* rows, int64_t n, int64_t n_groups, const std::byte* act, float* out) {
    constexpr int64_t kStep = kRows * kQuads;
    const auto* acts = reinterpret_cast<const NeuronActGroup*>(act);
    for (int64_t i = 0; i < n; i += kStep) {
      const uint8_t *now[kStep], *next[kStep];
      for (int64_t r = 0; r < kStep; ++r) {
        now[r] = row_at(rows[std::min(i + r, n - 1)]);
        next[r] = row_at(rows[std::min(i + kStep + r, n - 1)]);
      }
      const int64_t left = std::min(n - i, kStep);
      __m512 sums;
      if (left > 3 * kRows) sums = row_quads<4>(now, next, n_groups, acts);
      else if (left > 2 * kRows) sums = row_quads<3>(now, next, n_groups, acts);
      else if (left > kRows) sums = row_quads<2>(now, next, n_groups, acts);
      else sums = row_quads<1>(now, next, n_groups, acts);
      _mm512_mask_storeu_ps(out + i, static_cast<__mmask16>((1u << left) - 1), sums);
    }
  }

  static void several(const std::byte* const* rows, int64_t n, int64_t n_groups, const std::byte* acts,
                      int64_t act_stride, int64_t n_x, float* out, int64_t out_stride) {
    for (int64_t i = 0; i < n; i += kRows) {
      const uint8_t *now[kRows], *next[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        now[r] = row_at(rows[std::min(i + r, n - 1)]);
        next[r] = row_at(rows[std::min(i + kRows + r, n - 1)]);
      }
      const size_t bytes = static_cast<size_t>(std::min<int64_t>(n - i, kRows)) * sizeof(float);
      for (int64_t m = 0; m < n_x; m += kQuads) {
        const std::byte* some = acts + m * act_stride;
        const int64_t n_here = std::min<int64_t>(n_x - m, kQuads);
        // Only the first activations wait for memory.
        const uint8_t* const* ahead = m == 0 ? next : now;
        float sums[kRows * kQuads];
        if (n_here == 4) _mm512_storeu_ps(sums, act_quads<4>(now, ahead, n_groups, some, act_stride));
        else if (n_here == 3) _mm512_storeu_ps(sums, act_quads<3>(now, ahead, n_groups, some, act_stride));
        else if (n_here == 2) _mm512_storeu_ps(sums, act_quads<2>(now, ahead, n_groups, some, act_stride));
        else _mm512_storeu_ps(sums, act_quads<1>(now, ahead, n_groups, some, act_stride));
        for (int64_t x = 0; x < n_here; ++x) std::memcpy(out + (m + x) * out_stride + i, sums + kRows * x, bytes);
      }
    }
  }

  static void run(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts, int64_t act_stride,
                  int64_t n_x, float* out, int64_t out_stride) {
    const int64_t n_groups = neuron_groups(hidden);
    if (n_x == 1) one(rows, n, n_groups, acts, out);
    else several(rows, n, n_groups, acts, act_stride, n_x, out, out_stride);
  }
};

}  // namespace
}  // namespace edge
