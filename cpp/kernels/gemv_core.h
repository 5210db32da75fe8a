// The products of one tile with up to V::kMaxRows activation rows, over the unpacking of gemv_formats.h. Float steps
// come in the order of gemv_ref.cc; the integer steps are exact, so each ISA takes them as it does best:
//   V::dots<F, kRows>(w, part, q, act_stride, isum)                   isum[m] += dot of 32 values
//   V::run<F, i, kRows>(w, u, part, q, act_stride, scale, isum)       isum[m] += scale * dot of run u * kPeriod + i
//   V::kSigned<F>   whether these take F::kOffset away themselves
// q points at the 32 activations of row 0. Internal linkage: each includer compiles its own copy under its own flags.
#pragma once

#include <bit>

#include "kernels/gemv_driver.h"
#include "kernels/gemv_formats.h"
#include "kernels/gemv_panel.h"
#include "kernels/gemv_table.h"
#include "kernels/prefetch.h"

namespace edge {
namespace {

#if defined(__x86_64__)
#define EDGE_VECTOR_REGISTER "v"
#else
#define EDGE_VECTOR_REGISTER "w"
#endif

// Of one tile: from zero, or going on from what y holds.
template <typename V, int kRows, bool kGoOn>
struct Sums {
  typename V::Floats acc[kRows][V::kParts];

  inline Sums(const float* y, int64_t y_stride) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      for (int part = 0; part < V::kParts; ++part) {
        if constexpr (kGoOn) {
          acc[m][part] = V::load(y + m * y_stride + V::kLanes * part);
        } else {
          acc[m][part] = V::zero_floats();
        }
      }
    }
  }
  inline void store(float* y, int64_t y_stride) const {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
      for (int part = 0; part < V::kParts; ++part) V::store(y + m * y_stride + V::kLanes * part, acc[m][part]);
  }
};

// Between the parts of a tile: GCC would keep every activation of the part before for the next one, and spill them all,
// where reading it again costs no more than one load.
inline void forget_loads() { __asm__ volatile("" ::: "memory"); }

// As fast as V can multiply: enough sums that none waits for the one before, and nothing is read.
template <typename V>
inline int64_t multiply_int8(int64_t n_steps) {
  constexpr int kSums = 12;
  typename V::Words sums[kSums], a = V::zero(), b = V::zero();
  for (auto& sum : sums) sum = V::zero();
  for (int64_t i = 0; i < n_steps; ++i) {
    // Not known to the compiler, or it would multiply once for all.
    __asm__("" : "+" EDGE_VECTOR_REGISTER(a), "+" EDGE_VECTOR_REGISTER(b));
#pragma GCC unroll 16
    for (auto& sum : sums) sum = V::multiply_add(sum, a, b);
  }
  for (auto& sum : sums) __asm__ volatile("" : : EDGE_VECTOR_REGISTER(sum));
  return n_steps * kSums * static_cast<int64_t>(sizeof(a));
}

// Formats under one scale for 32 values.
template <typename V, WeightFormat kFormat>
struct Block32 {
  using F = Packed<V, kFormat>;
  static constexpr int64_t kBlockValues = 32;
  static constexpr int64_t kBlockBytes = F::kBlockBytes;
  static constexpr bool kPanels = false;

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<V, kRows, F::kGoOn> sums(y, y_stride);
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += sizeof(ActQ8x32)) {
      F::template prefetch<0, (kBlockBytes + 63) / 64>(w);
      unroll<V::kParts>([&](auto part) EDGE_INLINE_BODY {
        typename V::Words isum[kRows];
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) isum[m] = V::zero();
        V::template dots<F, kRows>(w, part, acts + offsetof(ActQ8x32, q), act_stride, isum);
        const typename V::Floats d = F::row_scales(w, part);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const auto* a = reinterpret_cast<const ActQ8x32*>(acts + m * act_stride);
          if constexpr (F::kOffset != 0 && !V::template kSigned<F>) {
            const auto sum = V::broadcast4(&a->sum);
            isum[m] = V::subtract(isum[m], V::template times_power<std::countr_zero(unsigned{F::kOffset})>(sum));
          }
          sums.acc[m][part] = V::accumulate(isum[m], d, a->d, sums.acc[m][part]);
        }
        if constexpr (V::kParts > 1) forget_loads();
      });
    }
    sums.store(y, y_stride);
  }
};

// Formats under scales of their own for every 32 or 16 of 256 values, their blocks where `F` has them (gemv_panel.h).
template <typename V, WeightFormat kFormat, typename F = Packed<V, kFormat>>
struct Block256 {
  static constexpr int64_t kBlockValues = 256;
  static constexpr int64_t kBlockBytes = F::kBlockBytes;
  static constexpr int64_t kActBytes = sizeof(ActQ8x256);
  static constexpr bool kPanels = Unpacked<V, kFormat>::kPays;
  using Panel = Unpacked<V, kFormat>;
  using FromPanel = Block256<V, kFormat, Panel>;
  static constexpr int kRuns = 8;
  static constexpr int kSteps = kRuns / F::kPeriod;
  static constexpr int64_t kStepBytes = kBlockBytes / (V::kParts * kSteps);
  static constexpr int kStepLines = static_cast<int>((kStepBytes + 63) / 64);

  static inline const ActQ8x256* block(const uint8_t* acts, int64_t act_stride, int m) {
    return reinterpret_cast<const ActQ8x256*>(acts + m * act_stride);
  }

  template <int kRows>
  static inline void tile(const uint8_t* w, int64_t n_blocks, const uint8_t* acts, int64_t act_stride, float* y,
                          int64_t y_stride) {
    Sums<V, kRows, F::kGoOn> sums(y, y_stride);
    for (int64_t b = 0; b < n_blocks; ++b, w += kBlockBytes, acts += kActBytes) {
      for (int part = 0; part < V::kParts; ++part) {
        typename V::Words scale[kRuns], isum[kRows];
        unroll<kRuns>([&](auto j) EDGE_INLINE_BODY { scale[j] = F::template scale<j>(w, part); });
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          isum[m] = V::zero();
          if constexpr (F::kOffset != 0 && !V::template kSigned<F>) {
            unroll<kRuns>([&](auto j) EDGE_INLINE_BODY {
              isum[m] = V::dot_pairs(isum[m], scale[j], V::broadcast4(block(acts, act_stride, m)->sums + 2 * j));
            });
            isum[m] = V::subtract(V::zero(), V::template times_power<std::countr_zero(unsigned{F::kOffset})>(isum[m]));
          }
        }
        for (int u = 0; u < kSteps; ++u) {
          unroll<F::kPeriod>([&](auto i) EDGE_INLINE_BODY {
            F::template prefetch<kStepLines * i / F::kPeriod, kStepLines*(i + 1) / F::kPeriod>(
                w + kStepBytes * (part * kSteps + u));
            const int j = u * F::kPeriod + i;
            const uint8_t* run = acts + offsetof(ActQ8x256, q) + 32 * j;
            V::template run<F, i, kRows>(w, u, part, run, act_stride, scale[j], isum);
          });
        }
        const typename V::Floats d = F::row_scales(w, part);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          sums.acc[m][part] = V::accumulate(isum[m], d, block(acts, act_stride, m)->d, sums.acc[m][part]);
        }
        if constexpr (F::kHasMins) {
          subtract_mins(w, part, acts, act_stride, sums);
        }
        if constexpr (V::kParts > 1) forget_loads();
      }
    }
    sums.store(y, y_stride);
  }

  // dmin * min * sum of activations, of every run.
  template <int kRows>
  static inline void subtract_mins(const uint8_t* w, int part, const uint8_t* acts, int64_t act_stride,
                                   Sums<V, kRows, F::kGoOn>& sums) {
    typename V::Words msum[kRows];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) msum[m] = V::zero();
    unroll<kRuns>([&](auto j) EDGE_INLINE_BODY {
      const auto min = F::template min<j>(w, part);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        msum[m] = V::dot_pairs(msum[m], min, V::broadcast4(block(acts, act_stride, m)->sums + 2 * j));
      }
    });
    const typename V::Floats dmin = F::min_scales(w, part);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      sums.acc[m][part] = V::reduce(msum[m], dmin, block(acts, act_stride, m)->d, sums.acc[m][part]);
    }
  }
};

}  // namespace

// Defines gemv_<format>_<isa> of every quantised format of a kind; the file names its vectors `Lanes`.
#define EDGE_GEMV_BLOCK32(isa, code, enumerator, name, ...) \
  EDGE_GEMV(gemv_##name##_##isa, run_tiles<Block32<Lanes, WeightFormat::enumerator>, Lanes::kMaxRows>)
#define EDGE_GEMV_BLOCK256(isa, code, enumerator, name, ...) \
  EDGE_GEMV(gemv_##name##_##isa, run_tiles<Block256<Lanes, WeightFormat::enumerator>, Lanes::kMaxRows>)

}  // namespace edge
