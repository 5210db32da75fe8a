// The definition of every matrix product. Integer dots are exact; each float step is one fmaf in block order, so a
// vector ISA that keeps a row in its own lane gives the same bits. Layouts: formats/tile_block.cc.
#include <cmath>

#include "kernels/formats/decoders.h"
#include "kernels/gemv_table.h"
#include "kernels/half.h"

namespace edge {
namespace {

// y[m, row] = row_dot(tile, r, k, acts of m) for every row of the tiles.
template <typename RowDot>
void for_each_row(WeightFormat format, const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride,
                  int64_t n_rows, float* y, int64_t y_stride, int64_t tile_begin, int64_t tile_end,
                  const RowDot& row_dot) {
  const int64_t stride = tile_stride_bytes(format, k);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const auto* w = reinterpret_cast<const uint8_t*>(tiles) + tile * stride;
    for (int64_t m = 0; m < n_rows; ++m) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        y[m * y_stride + tile * kTileRows + r] = row_dot(w, r, k, acts + m * act_stride);
      }
    }
  }
}

template <typename Weight, typename ToFloat>
float dot_float(const uint8_t* w, int64_t r, int64_t k, const std::byte* act, const ToFloat& to_float) {
  const auto* x = reinterpret_cast<const float*>(act);
  float acc[4] = {};
  for (int64_t i = 0; i < k; ++i) {
    const float weight = to_float(load_as<Weight>(w + (i * kTileRows + r) * static_cast<int64_t>(sizeof(Weight))));
    acc[i % 4] = std::fmaf(weight, x[i], acc[i % 4]);
  }
  return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// Byte of K group s (4 values), row r, value b in a run of interleaved groups.
uint8_t interleaved(const uint8_t* q, int64_t k, int64_t r) { return q[(k / 4) * 64 + r * 4 + k % 4]; }

// A block of 32: acc + (sum of value * activation) * (d_w * d_a). value(q, i) is value i of row r, q behind the scales.
template <WeightFormat kFormat, typename Value>
float dot_32(const uint8_t* w, int64_t r, int64_t k, const std::byte* act, const Value& value) {
  constexpr FormatTraits kTraits = kFormatTraits[static_cast<size_t>(kFormat)];
  constexpr bool kExponent = kTraits.scales == Scales::kExponent;
  const auto* a = reinterpret_cast<const ActQ8x32*>(act);
  float acc = 0;
  for (int64_t b = 0; b < k / 32; ++b, w += kTraits.tile_block_bytes) {
    int32_t isum = 0;
    for (int64_t i = 0; i < 32; ++i) isum += value(w + (kExponent ? 16 : 32), i, r) * a[b].q[i];
    const float d = kExponent ? e8m0_half(w[r]) : half_to_float(load_as<uint16_t>(w + 2 * r));
    acc = std::fmaf(static_cast<float>(isum), d * a[b].d, acc);
  }
  return acc;
}

int value_q8_0(const uint8_t* q, int64_t i, int64_t r) { return interleaved(q, i, r) - 128; }

// Value i of 32 in 16 bytes: the low nibbles come first.
int nibble(const uint8_t* q, int64_t i, int64_t r) { return (interleaved(q, i % 16, r) >> (i / 16 * 4)) & 15; }

int value_q4_0(const uint8_t* q, int64_t i, int64_t r) { return nibble(q, i, r) - 8; }
int value_iq4_nl(const uint8_t* q, int64_t i, int64_t r) { return kIq4Steps[nibble(q, i, r)]; }
int value_mxfp4(const uint8_t* q, int64_t i, int64_t r) { return kE2m1Doubled[nibble(q, i, r)]; }

// A block of 256: acc + (sum of scale * value * activation) * (d_w * d_a), then, with mins, minus (sum of min * sum of
// activations) * (dmin * d_a). Format::value(w, i, r) is value i of row r; scale and min(w, g, r) are those of its
// group g of 16 values.
template <typename Format>
float dot_256(const uint8_t* w, int64_t r, int64_t k, const std::byte* act) {
  constexpr FormatTraits kTraits = kFormatTraits[static_cast<size_t>(Format::kFormat)];
  const auto* a = reinterpret_cast<const ActQ8x256*>(act);
  float acc = 0;
  for (int64_t b = 0; b < k / 256; ++b, w += kTraits.tile_block_bytes) {
    int32_t isum = 0;
    int32_t msum = 0;
    for (int64_t g = 0; g < 16; ++g) {
      int32_t dot = 0;
      for (int64_t i = 16 * g; i < 16 * g + 16; ++i) dot += Format::value(w, i, r) * a[b].q[i];
      isum += Format::scale(w, g, r) * dot;
      if constexpr (kTraits.scales == Scales::kTwoHalves) msum += Format::min(w, g, r) * a[b].sums[g];
    }
    acc = std::fmaf(static_cast<float>(isum), half_to_float(load_as<uint16_t>(w + 2 * r)) * a[b].d, acc);
    if constexpr (kTraits.scales == Scales::kTwoHalves) {
      const float dmin = half_to_float(load_as<uint16_t>(w + 32 + 2 * r));
      acc = std::fmaf(-static_cast<float>(msum), dmin * a[b].d, acc);
    }
  }
  return acc;
}

// Value i in nibbles of pairs of runs of 32, in bits of a byte that four runs share, in bits that eight share.
int paired_nibble(const uint8_t* q, int64_t i, int64_t r) {
  return (interleaved(q + i / 64 * 512, i % 32, r) >> (i / 32 % 2 * 4)) & 15;
}
int two_bits(const uint8_t* q, int64_t i, int64_t r) {
  return (interleaved(q + i / 128 * 512, i % 32, r) >> (i / 32 % 4 * 2)) & 3;
}
int one_bit(const uint8_t* q, int64_t i, int64_t r) { return (interleaved(q, i % 32, r) >> (i / 32)) & 1; }

struct RefQ4_K {
  static constexpr WeightFormat kFormat = WeightFormat::kQ4_K;
  static int value(const uint8_t* w, int64_t i, int64_t r) { return paired_nibble(w + 256, i, r); }
  static int scale(const uint8_t* w, int64_t g, int64_t r) { return low(w, g, r) % 16 | top(w, g, r) % 4 << 4; }
  static int min(const uint8_t* w, int64_t g, int64_t r) { return low(w, g, r) / 16 | top(w, g, r) / 4 << 4; }
  static int low(const uint8_t* w, int64_t g, int64_t r) { return w[64 + g / 2 * 16 + r]; }
  static int top(const uint8_t* w, int64_t g, int64_t r) { return (w[192 + g / 4 * 16 + r] >> (g / 2 % 2 * 4)) & 15; }
};

struct RefQ5_K {
  static constexpr WeightFormat kFormat = WeightFormat::kQ5_K;
  static int value(const uint8_t* w, int64_t i, int64_t r) {
    return paired_nibble(w + 768, i, r) | one_bit(w + 256, i, r) << 4;
  }
  static int scale(const uint8_t* w, int64_t g, int64_t r) { return six_bits(w + 64, g / 2, 0, r); }
  static int min(const uint8_t* w, int64_t g, int64_t r) { return six_bits(w + 64, g / 2, 1, r); }
  static int six_bits(const uint8_t* packed, int64_t j, int which, int64_t r) {
    const int first = interleaved(packed, 4 * which + j % 4, r);
    if (j < 4) return first & 63;
    return ((interleaved(packed, 8 + j % 4, r) >> (4 * which)) & 15) | first >> 6 << 4;
  }
};

struct RefQ6_K {
  static constexpr WeightFormat kFormat = WeightFormat::kQ6_K;
  static int value(const uint8_t* w, int64_t i, int64_t r) {
    return (paired_nibble(w + 288, i, r) | two_bits(w + 2336, i, r) << 4) - 32;
  }
  static int scale(const uint8_t* w, int64_t g, int64_t r) { return static_cast<int8_t>(w[32 + g * 16 + r]); }
};

struct RefQ2_K {
  static constexpr WeightFormat kFormat = WeightFormat::kQ2_K;
  static int value(const uint8_t* w, int64_t i, int64_t r) { return two_bits(w + 320, i, r); }
  static int scale(const uint8_t* w, int64_t g, int64_t r) { return interleaved(w + 64, g, r) & 15; }
  static int min(const uint8_t* w, int64_t g, int64_t r) { return interleaved(w + 64, g, r) >> 4; }
};

struct RefQ3_K {
  static constexpr WeightFormat kFormat = WeightFormat::kQ3_K;
  static int value(const uint8_t* w, int64_t i, int64_t r) {
    return (two_bits(w + 224, i, r) | one_bit(w + 1248, i, r) << 2) - 4;
  }
  static int scale(const uint8_t* w, int64_t g, int64_t r) {
    const int low = (interleaved(w + 32, g % 8, r) >> (g / 8 * 4)) & 15;
    const int top = (interleaved(w + 32, 8 + g % 4, r) >> (g / 4 * 2)) & 3;
    return (low | top << 4) - 32;
  }
};

struct RefIQ4_XS {
  static constexpr WeightFormat kFormat = WeightFormat::kIQ4_XS;
  static int value(const uint8_t* w, int64_t i, int64_t r) {
    return kIq4Steps[nibble(w + 128 + i / 32 * 256, i % 32, r)];
  }
  static int scale(const uint8_t* w, int64_t g, int64_t r) {
    const int64_t j = g / 2;
    const int low = (interleaved(w + 64, j / 2, r) >> (j % 2 * 4)) & 15;
    const int top = (load_as<uint16_t>(w + 32 + 2 * r) >> (2 * j)) & 3;
    return (low | top << 4) - 32;
  }
};

}  // namespace

#define EDGE_GEMV_REF(name, format, row_dot)                                                                        \
  void name(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride, int64_t n_rows, float* y, \
            int64_t y_stride, int64_t tile_begin, int64_t tile_end) {                                               \
    for_each_row(WeightFormat::format, tiles, k, acts, act_stride, n_rows, y, y_stride, tile_begin, tile_end,       \
                 row_dot);                                                                                          \
  }

EDGE_DECLARE_GEMV_TABLE(ref);

EDGE_GEMV_REF(gemv_f32_ref, kF32, ([](const uint8_t* w, int64_t r, int64_t n, const std::byte* x) {
                return dot_float<float>(w, r, n, x, [](float value) { return value; });
              }))
EDGE_GEMV_REF(gemv_f16_ref, kF16, ([](const uint8_t* w, int64_t r, int64_t n, const std::byte* x) {
                return dot_float<uint16_t>(w, r, n, x, half_to_float);
              }))
EDGE_GEMV_REF(gemv_bf16_ref, kBF16, ([](const uint8_t* w, int64_t r, int64_t n, const std::byte* x) {
                return dot_float<uint16_t>(w, r, n, x, bf16_to_float);
              }))
#define EDGE_GEMV_REF_32(name, format)                                                         \
  EDGE_GEMV_REF(gemv_##name##_ref, format,                                                     \
                ([](const uint8_t* w, int64_t r, int64_t n, const std::byte* x) {              \
                  return dot_32<WeightFormat::format>(w, r, n, x, value_##name);               \
                }))
EDGE_GEMV_REF_32(q8_0, kQ8_0)
EDGE_GEMV_REF_32(q4_0, kQ4_0)
EDGE_GEMV_REF_32(iq4_nl, kIQ4_NL)
EDGE_GEMV_REF_32(mxfp4, kMXFP4)
EDGE_GEMV_REF(gemv_q4_k_ref, kQ4_K, dot_256<RefQ4_K>)
EDGE_GEMV_REF(gemv_q6_k_ref, kQ6_K, dot_256<RefQ6_K>)
EDGE_GEMV_REF(gemv_q5_k_ref, kQ5_K, dot_256<RefQ5_K>)
EDGE_GEMV_REF(gemv_q2_k_ref, kQ2_K, dot_256<RefQ2_K>)
EDGE_GEMV_REF(gemv_q3_k_ref, kQ3_K, dot_256<RefQ3_K>)
EDGE_GEMV_REF(gemv_iq4_xs_ref, kIQ4_XS, dot_256<RefIQ4_XS>)

}  // namespace edge
