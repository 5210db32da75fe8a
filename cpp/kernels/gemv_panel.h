// Where the products take a tile's blocks of 256 values from: `Packed`, as they lie in the pack, unpacked anew for
// every few rows; or `Unpacked`, from a panel that one unpacking fills for the many rows of a prompt. Both give what
// Unpack<V, format> gives (gemv_formats.h), the floats that scale a block, and
//   kGoOn   whether sums go on from what y holds, because a panel is only a part of K
// Internal linkage: each includer compiles its own copy under its own flags.
#pragma once

#include <utility>

#include "kernels/gemv_formats.h"
#include "kernels/prefetch.h"

namespace edge {
namespace {

// What holds its sums in registers through a reference must be inlined, whatever the compiler's measure says.
#define EDGE_INLINE inline __attribute__((always_inline))
#define EDGE_INLINE_BODY __attribute__((always_inline))

template <int n, typename F, int... i>
EDGE_INLINE void unroll(const F& body, std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>()), ...);
}
// body(integral_constant 0), ..., body(integral_constant n - 1).
template <int n, typename F>
EDGE_INLINE void unroll(const F& body) {
  unroll<n>(body, std::make_integer_sequence<int, n>());
}

template <typename V, WeightFormat kFormat>
struct Packed : Unpack<V, kFormat> {
  static constexpr const FormatTraits& kTraits = kFormatTraits[static_cast<size_t>(kFormat)];
  static constexpr int64_t kBlockBytes = kTraits.tile_block_bytes;
  static constexpr bool kHasMins = kTraits.scales == Scales::kTwoHalves;
  static constexpr bool kGoOn = false;

  static inline auto row_scales(const uint8_t* w, int part) { return V::template row_scales<kTraits.scales>(w, part); }
  static inline auto min_scales(const uint8_t* w, int part) { return V::float_halves(w + 2 * kTileRows, part); }
  // Lines [first, last) of the 64-byte lines after p, as far ahead as the ISA reads.
  template <int first, int last>
  static inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 64
    for (int line = first; line < last; ++line) prefetch_line(p + 64 * line + V::kPrefetchBytes);
  }
};

// A block in 64-byte words of 16 rows: quants of 8 runs, scales and mins of the runs, the floats that scale these.
template <typename V, WeightFormat kFormat>
struct Unpacked {
  using P = Packed<V, kFormat>;
  // Where quants lie in two places, taking them together costs as much as multiplying with some rows. Other formats'
  // unpacking hides behind the products. And the vectors have to say how they are put away.
  static constexpr bool kPays =
      (kFormat == WeightFormat::kQ3_K || kFormat == WeightFormat::kQ5_K || kFormat == WeightFormat::kQ6_K) &&
      requires(uint8_t* p, typename V::Words x) { V::put(p, 0, x); };
  static constexpr int kRuns = 8;
  static constexpr int64_t kScalesAt = 64 * 8 * kRuns, kMinsAt = kScalesAt + 64 * kRuns;
  static constexpr int64_t kRowScalesAt = kMinsAt + 64 * kRuns, kMinScalesAt = kRowScalesAt + 64;

  static constexpr int kMaxQuant = P::kMaxQuant, kOffset = P::kOffset, kPeriod = 1, kGroup = P::kGroup;
  static constexpr bool kHasMins = P::kHasMins;
  static constexpr bool kGoOn = true;
  static constexpr int64_t kBlockBytes = kMinScalesAt + 64;

  template <int i, int s>
  static inline auto quants(const uint8_t* w, int u, int part) {
    return V::words(w + 64 * (8 * u + s), part);
  }
  template <int j>
  static inline auto scale(const uint8_t* w, int part) {
    return V::words(w + kScalesAt + 64 * j, part);
  }
  template <int j>
  static inline auto min(const uint8_t* w, int part) {
    return V::words(w + kMinsAt + 64 * j, part);
  }
  static inline auto row_scales(const uint8_t* w, int part) { return floats(w + kRowScalesAt, part); }
  static inline auto min_scales(const uint8_t* w, int part) { return floats(w + kMinScalesAt, part); }
  template <int first, int last>
  static inline void prefetch(const uint8_t*) {}

  // Panel of the block at w.
  static inline void fill(const uint8_t* w, uint8_t* panel) {
    P::template prefetch<0, (P::kBlockBytes + 63) / 64>(w);
    for (int part = 0; part < V::kParts; ++part) {
      for (int u = 0; u < kRuns / P::kPeriod; ++u) {
        unroll<8 * P::kPeriod>([&](auto at) EDGE_INLINE_BODY {
          V::put(panel + 64 * (8 * P::kPeriod * u + at), part, P::template quants<at / 8, at % 8>(w, u, part));
        });
      }
      put_floats(panel + kRowScalesAt, part, P::row_scales(w, part));
      if constexpr (kHasMins) put_floats(panel + kMinScalesAt, part, P::min_scales(w, part));
      unroll<kRuns>([&](auto j) EDGE_INLINE_BODY {
        V::put(panel + kScalesAt + 64 * j, part, P::template scale<j>(w, part));
        if constexpr (kHasMins) V::put(panel + kMinsAt + 64 * j, part, P::template min<j>(w, part));
      });
    }
  }

 private:
  static inline auto floats(const uint8_t* p, int part) {
    return V::load(reinterpret_cast<const float*>(p) + V::kLanes * part);
  }
  static inline void put_floats(uint8_t* p, int part, typename V::Floats x) {
    V::store(reinterpret_cast<float*>(p) + V::kLanes * part, x);
  }
};

}  // namespace
}  // namespace edge
