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
  __m512 front, back;
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
      __m512i some = _mm512_loadu_si512(p + 64 * s);
      // Used twice, and read once: most of these registers cross two lines.
      asm("" : "+v"(some));
      q[s] = kNibbles ? _mm512_and_si512(some, mask) : some;
      if (kNibbles) q[2 + s] = _mm512_and_si512(_mm512_srli_epi16(some, 4), mask);
    }
  }

  static inline __m512 scales(const std::byte* front, const std::byte* back) {
    const __m256i both = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(front))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(back)), 1);
    return _mm512_cvtph_ps(both);
  }

  static inline Group load(const std::byte* const* rows, int64_t at) {
    Group group;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) quants(row_at(rows[r]) + at + 16, group.q[r]);
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

  static inline void prefetch(const std::byte* const* next, int64_t at) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) prefetch_lines<kGroupBytes>(row_at(next[r]) + at);
  }

  // Sixteen rows and some activation rows: quads lie in memory between their groups, so a decoded group serves all.
  static inline void add_quads(const std::byte* const* rows, const std::byte* const* next, int n_quads, int64_t n_groups,
                               const std::byte* acts, int64_t act_stride, int64_t n_x, Quad (*quads)[kQuads]) {
    for (int q = 0; q < n_quads; ++q) {
      for (int64_t g = 0; g < n_groups; ++g) {
        prefetch(next + kRows * q, g * kGroupBytes);
        const Group group = load(rows + kRows * q, g * kGroupBytes);
        for (int64_t m = 0; m < n_x; ++m) {
          Quad sum = g == 0 ? Quad{_mm512_setzero_ps(), _mm512_setzero_ps()} : quads[m][q];
          add(group, ZmmAct::of<kOffsetBits>(reinterpret_cast<const NeuronActGroup*>(acts + m * act_stride)[g]), sum);
          quads[m][q] = sum;
        }
      }
    }
  }

  static void run(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts, int64_t act_stride,
                  int64_t n_x, float* out, int64_t out_stride) {
    constexpr int64_t kStep = kRows * kQuads, kActs = 16;
    const int64_t n_groups = neuron_groups(hidden);
    Quad quads[kActs][kQuads];
    const std::byte* last[kStep];
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t left = std::min(n - i, kStep);
      const std::byte* const* now = rows + i;
      if (left < kStep) {
        std::fill(std::copy_n(now, left, last), last + kStep, now[0]);
        now = last;
      }
      const std::byte* const* next = i + 2 * kStep <= n ? now + kStep : now;
      for (int64_t m = 0; m < n_x; m += kActs) {
        const int64_t n_here = std::min(n_x - m, kActs);
        // Only the first activations wait for memory.
        add_quads(now, m == 0 ? next : now, static_cast<int>((left + kRows - 1) / kRows), n_groups,
                  acts + m * act_stride, act_stride, n_here, quads);
        for (int64_t x = 0; x < n_here; ++x) {
          _mm512_mask_storeu_ps(out + (m + x) * out_stride + i, static_cast<__mmask16>((1u << left) - 1), sums(quads[x]));
        }
      }
    }
  }
};

}  // namespace
}  // namespace edge
