// ARMv8.6 SMMLA: two rows of 8 bytes times two rows of 8 bytes, four sums. Two registers of 4 rows x 4 values, zipped,
// are 2 rows x 8 values each; two activation rows, zipped, are the other side. One row alone takes SDOT, of which it
// needs no more. Float steps are those of gemv_core.h. Internal linkage: only the _neon_i8mm files include this.
#pragma once

#include "kernels/gemv_sdot.h"

namespace edge {

EDGE_DECLARE_QUANTISED_GEMV(neon_i8mm);

namespace {

using Lanes = NeonLanes<Sdot>;

constexpr int kHalves = 2;     // of the four rows of a part: rows 0 and 1, rows 2 and 3

// [w0 a0, w0 a1, w1 a0, w1 a1] of two weight rows and two activation rows, for each half of a part.
struct PairWords {
  int32x4_t half[kHalves];
};
struct PairFloats {
  float32x4_t half[kHalves];
};

inline PairWords pair_zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0)}}; }
// One number for each weight row, as sums have them.
inline PairWords pair_weights(int32x4_t x) { return {{vzip1q_s32(x, x), vzip2q_s32(x, x)}}; }
inline PairFloats pair_weights(float32x4_t x) { return {{vzip1q_f32(x, x), vzip2q_f32(x, x)}}; }
// One number for each activation row.
inline float32x4_t pair_acts(float a, float b) {
  const float32x2_t both = {a, b};
  return vcombine_f32(both, both);
}

inline int32x4_t mmla(int32x4_t sum, int8x16_t w, int8x16_t a) { return vmmlaq_s32(sum, w, a); }

// acc +- isum * (d_w * d_a), rounded as the definition says.
EDGE_INLINE void pair_accumulate(const PairWords& isum, const PairFloats& d_w, float32x4_t d_a, PairFloats& acc) {
#pragma GCC unroll 2
  for (int h = 0; h < kHalves; ++h) {
    acc.half[h] = vfmaq_f32(acc.half[h], vcvtq_f32_s32(isum.half[h]), vmulq_f32(d_w.half[h], d_a));
  }
}
EDGE_INLINE void pair_reduce(const PairWords& isum, const PairFloats& d_w, float32x4_t d_a, PairFloats& acc) {
#pragma GCC unroll 2
  for (int h = 0; h < kHalves; ++h) {
    acc.half[h] = vfmsq_f32(acc.half[h], vcvtq_f32_s32(isum.half[h]), vmulq_f32(d_w.half[h], d_a));
  }
}

// Values 8j..8j+7 of rows a and b side by side, j < n / 8.
template <int n>
EDGE_INLINE void zip_acts(const int8_t* a, const int8_t* b, int8x16_t* out) {
#pragma GCC unroll 16
  for (int i = 0; i < n; i += 16) {
    const int64x2_t row_a = vreinterpretq_s64_s8(vld1q_s8(a + i)), row_b = vreinterpretq_s64_s8(vld1q_s8(b + i));
    out[i / 8] = vreinterpretq_s8_s64(vzip1q_s64(row_a, row_b));
    out[i / 8 + 1] = vreinterpretq_s8_s64(vzip2q_s64(row_a, row_b));
  }
}

// A run of 32 values of one part's rows, as SMMLA takes them: [j][half].
template <typename F, int i>
EDGE_INLINE void pair_unpack(const uint8_t* w, int u, int part, int8x16_t (&values)[4][kHalves]) {
  int8x16_t words[8];
  Lanes::unpack<F, i>(w, u, part, words);
  unroll<4>([&](auto j) EDGE_INLINE_BODY {
    const int32x4_t first = vreinterpretq_s32_s8(words[2 * j]), second = vreinterpretq_s32_s8(words[2 * j + 1]);
    values[j][0] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
    values[j][1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
  });
}

// sum + the products of words 8j..8j+7, j in [first, first + n).
template <int first, int n>
EDGE_INLINE PairWords pair_dot(PairWords sum, const int8x16_t (&values)[4][kHalves], const int8x16_t* acts) {
  unroll<n>([&](auto at) EDGE_INLINE_BODY {
    constexpr int j = first + at;
    sum.half[0] = mmla(sum.half[0], values[j][0], acts[j]);
    sum.half[1] = mmla(sum.half[1], values[j][1], acts[j]);
  });
  return sum;
}

// The activation rows of one call, two by two; the last one is its own partner where their number is odd.
template <typename Block, int kPairs>
struct PairRows {
  const Block* row[2 * kPairs];

  inline PairRows(const uint8_t* acts, int64_t stride, int n_rows) {
    for (int m = 0; m < 2 * kPairs; ++m) {
      row[m] = reinterpret_cast<const Block*>(acts + std::min(m, n_rows - 1) * stride);
    }
  }
};

template <int kPairs>
struct PairSums {
  PairFloats acc[Neon::kParts][kPairs];

  inline PairSums() {
    for (auto& part : acc)
      for (auto& pair : part) pair = {{vdupq_n_f32(0), vdupq_n_f32(0)}};
  }
  inline void store(float* y, int64_t y_stride, int n_rows) const {
    for (int p = 0; p < kPairs; ++p) {
      for (int part = 0; part < Neon::kParts; ++part) {
        const PairFloats& sums = acc[part][p];
        float* out = y + 2 * p * y_stride + Neon::kLanes * part;
        vst1q_f32(out, vuzp1q_f32(sums.half[0], sums.half[1]));
        if (2 * p + 1 < n_rows) vst1q_f32(out + y_stride, vuzp2q_f32(sums.half[0], sums.half[1]));
      }
    }
  }
};

// Formats under one scale for 32 values.
template <WeightFormat kFormat>
struct Pairs32 {
  using One = Block32<Lanes, kFormat>;
  using F = Packed<Lanes, kFormat>;
  static constexpr int kMaxRows = 8;  // with 16 the activations alone would fill the registers

  template <int kPairs>
  static void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* a, int64_t act_stride, int n_rows, float* y,
                   int64_t y_stride) {
    const PairRows<ActQ8x32, kPairs> rows(a, act_stride, n_rows);
    PairSums<kPairs> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += One::kBlockBytes) {
      F::template prefetch<0, (One::kBlockBytes + 63) / 64>(w);
      int8x16_t acts[kPairs][4];
      float32x4_t d_a[kPairs];
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) {
        const ActQ8x32 &one = rows.row[2 * p][b], &other = rows.row[2 * p + 1][b];
        zip_acts<32>(one.q, other.q, acts[p]);
        d_a[p] = pair_acts(one.d, other.d);
      }
      unroll<Neon::kParts>([&](auto part) EDGE_INLINE_BODY {
        int8x16_t values[4][kHalves];
        pair_unpack<F, 0>(w, 0, part, values);
        const PairFloats d_w = pair_weights(F::row_scales(w, part));
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; ++p) {
          pair_accumulate(pair_dot<0, 4>(pair_zero(), values, acts[p]), d_w, d_a[p], sums.acc[part][p]);
        }
        forget_loads();
      });
    }
    sums.store(y, y_stride, n_rows);
  }
};

// Formats under scales of their own for every 32 or 16 of 256 values.
template <WeightFormat kFormat>
struct Pairs256 {
  using One = Block256<Lanes, kFormat>;
  using F = Packed<Lanes, kFormat>;
  static constexpr int kMaxRows = 16;
  static constexpr bool kMins = F::kHasMins;
  static constexpr int kGroups = 32 / F::kGroup;  // of a run

  template <int kPairs>
  struct Acts {
    int8x16_t q[kPairs][32];
    float32x4_t d[kPairs];
    int16x8_t sums[2 * kPairs][kGroups];  // of a run, or of the first groups of all runs and of the second ones

    inline Acts(const PairRows<ActQ8x256, kPairs>& rows, int64_t b) {
      for (int p = 0; p < kPairs; ++p) {
        const ActQ8x256 &one = rows.row[2 * p][b], &other = rows.row[2 * p + 1][b];
        zip_acts<256>(one.q, other.q, q[p]);
        d[p] = pair_acts(one.d, other.d);
        if constexpr (kMins) {
          take_sums(one, sums[2 * p]);
          take_sums(other, sums[2 * p + 1]);
        }
      }
    }
    static inline void take_sums(const ActQ8x256& block, int16x8_t* out) {
      const int16x8_t low = vld1q_s16(block.sums), high = vld1q_s16(block.sums + 8);
      if constexpr (kGroups == 1) {
        out[0] = vpaddq_s16(low, high);
      } else {
        out[0] = vuzp1q_s16(low, high);
        out[1] = vuzp2q_s16(low, high);
      }
    }
  };

  template <int kPairs>
  static void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* a, int64_t act_stride, int n_rows, float* y,
                   int64_t y_stride) {
    const PairRows<ActQ8x256, kPairs> rows(a, act_stride, n_rows);
    PairSums<kPairs> sums;
    for (int64_t b = 0; b < n_blocks; ++b, w += One::kBlockBytes) {
      const Acts<kPairs> acts(rows, b);
      for (int part = 0; part < Neon::kParts; ++part) {
        PairWords isum[kPairs];
        for (auto& sum : isum) sum = pair_zero();
        integer_steps<kPairs>(w, part, acts, isum);
        const PairFloats d_w = pair_weights(F::row_scales(w, part));
        for (int p = 0; p < kPairs; ++p) pair_accumulate(isum[p], d_w, acts.d[p], sums.acc[part][p]);
        if constexpr (kMins) subtract_mins<kPairs>(w, part, acts, sums);
        forget_loads();
      }
    }
    sums.store(y, y_stride, n_rows);
  }

  template <int kPairs>
  EDGE_INLINE static void integer_steps(const uint8_t* w, int part, const Acts<kPairs>& acts,
                                        PairWords (&isum)[kPairs]) {
    PairWords scale[One::kRuns][kGroups];
    unroll<One::kRuns>([&](auto j) EDGE_INLINE_BODY {
      const auto both = F::template scale<j>(w, part);
      scale[j][kGroups - 1] = pair_weights(Lanes::second_of_pair(both));
      if constexpr (kGroups == 2) scale[j][0] = pair_weights(Lanes::first_of_pair(both));
    });
    for (int u = 0; u < One::kSteps; ++u) {
      unroll<F::kPeriod>([&](auto i) EDGE_INLINE_BODY {
        F::template prefetch<One::kStepLines * i / F::kPeriod, One::kStepLines*(i + 1) / F::kPeriod>(
            w + One::kStepBytes * (part * One::kSteps + u));
        const int j = u * F::kPeriod + i;
        int8x16_t values[4][kHalves];
        pair_unpack<F, i>(w, u, part, values);
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; ++p) {
          unroll<kGroups>([&](auto g) EDGE_INLINE_BODY {
            const PairWords dot = pair_dot<4 / kGroups * g, 4 / kGroups>(pair_zero(), values, acts.q[p] + 4 * j);
            isum[p].half[0] = vmlaq_s32(isum[p].half[0], dot.half[0], scale[j][g].half[0]);
            isum[p].half[1] = vmlaq_s32(isum[p].half[1], dot.half[1], scale[j][g].half[1]);
          });
        }
      });
    }
  }

  // dmin * min * sum of activations, of every run.
  template <int kPairs>
  EDGE_INLINE static void subtract_mins(const uint8_t* w, int part, const Acts<kPairs>& acts, PairSums<kPairs>& sums) {
    int16x4_t mins[One::kRuns][kGroups];
    unroll<One::kRuns>([&](auto j) EDGE_INLINE_BODY {
      const auto both = F::template min<j>(w, part);
      mins[j][0] = vmovn_s32(both);
      if constexpr (kGroups == 2) mins[j][1] = vshrn_n_s32(both, 16);
    });
    const PairFloats dmin = pair_weights(Lanes::float_halves(w + 2 * kTileRows, part));
    for (int p = 0; p < kPairs; ++p) {
      int32x4_t msum[2];  // of each activation row
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a) {
        msum[a] = vdupq_n_s32(0);
        unroll<One::kRuns>([&](auto j) EDGE_INLINE_BODY {
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
            msum[a] = vmlal_laneq_s16(msum[a], mins[j][g], acts.sums[2 * p + a][g], j);
          }
        });
      }
      const PairWords both = {{vzip1q_s32(msum[0], msum[1]), vzip2q_s32(msum[0], msum[1])}};
      pair_reduce(both, dmin, acts.d[p], sums.acc[part][p]);
    }
  }
};

// What run_tiles takes: one row by SDOT, several by SMMLA.
template <typename Pairs>
struct OneOrPairs {
  static constexpr int64_t kBlockValues = Pairs::One::kBlockValues;
  static constexpr int64_t kBlockBytes = Pairs::One::kBlockBytes;
  static constexpr bool kPanels = false;

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    if constexpr (kRows == 1) {
      Pairs::One::template tile<1>(w, n_blocks, acts, act_stride, y, y_stride);
    } else {
      Pairs::template tile<(kRows + 1) / 2>(w, n_blocks, acts, act_stride, kRows, y, y_stride);
    }
  }
};

template <typename Pairs, typename... Arguments>
inline void run_pairs(Arguments... arguments) {
  run_tiles<OneOrPairs<Pairs>, Pairs::kMaxRows>(arguments...);
}

// As fast as SMMLA multiplies: each does twice the products of a register of bytes.
struct Smmla : Neon {
  static inline Words multiply_add(Words sum, Words a, Words b) {
    return mmla(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
};

}  // namespace

#define EDGE_GEMV_PAIRS32(isa, code, enumerator, name, ...) \
  EDGE_GEMV(gemv_##name##_##isa, run_pairs<Pairs32<WeightFormat::enumerator>>)
#define EDGE_GEMV_PAIRS256(isa, code, enumerator, name, ...) \
  EDGE_GEMV(gemv_##name##_##isa, run_pairs<Pairs256<WeightFormat::enumerator>>)

}  // namespace edge
