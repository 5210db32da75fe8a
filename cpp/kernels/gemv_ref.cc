// The definition of every matrix product. Integer dots are exact; each float step is one fmaf in block order, so a
// vector ISA that keeps a row in its own lane gives the same bits.
#include <cmath>

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

float dot_q8_0(const uint8_t* w, int64_t r, int64_t k, const std::byte* act) {
  const auto* a = reinterpret_cast<const ActQ8x32*>(act);
  float acc = 0;
  for (int64_t b = 0; b < k / 32; ++b, w += 544) {
    int32_t isum = 0;
    for (int64_t i = 0; i < 32; ++i) isum += (interleaved(w + 32, i, r) - 128) * a[b].q[i];
    acc = std::fmaf(static_cast<float>(isum), half_to_float(load_as<uint16_t>(w + 2 * r)) * a[b].d, acc);
  }
  return acc;
}

float dot_q4_0(const uint8_t* w, int64_t r, int64_t k, const std::byte* act) {
  const auto* a = reinterpret_cast<const ActQ8x32*>(act);
  float acc = 0;
  for (int64_t b = 0; b < k / 32; ++b, w += 288) {
    int32_t isum = 0;
    for (int64_t i = 0; i < 16; ++i) {
      const uint8_t pair = interleaved(w + 32, i, r);
      isum += ((pair & 15) - 8) * a[b].q[i] + ((pair >> 4) - 8) * a[b].q[i + 16];
    }
    acc = std::fmaf(static_cast<float>(isum), half_to_float(load_as<uint16_t>(w + 2 * r)) * a[b].d, acc);
  }
  return acc;
}

float dot_q4_k(const uint8_t* w, int64_t r, int64_t k, const std::byte* act) {
  const auto* a = reinterpret_cast<const ActQ8x256*>(act);
  float acc = 0;
  for (int64_t b = 0; b < k / 256; ++b, w += 2304) {
    const uint8_t* low = w + 64;
    const uint8_t* top = w + 192;
    int32_t isum = 0;
    int32_t msum = 0;
    for (int64_t j = 0; j < 8; ++j) {
      const uint8_t* q = w + 256 + (j / 2) * 512;
      const int nibble_shift = j % 2 == 0 ? 0 : 4;
      int32_t dot = 0;
      for (int64_t i = 0; i < 32; ++i) dot += ((interleaved(q, i, r) >> nibble_shift) & 15) * a[b].q[j * 32 + i];
      const int low_bits = low[j * 16 + r];
      const int top_bits = top[(j / 2) * 16 + r] >> nibble_shift;
      const int scale = (low_bits & 15) | ((top_bits & 3) << 4);
      const int min = (low_bits >> 4) | ((top_bits & 12) << 2);
      isum += scale * dot;
      msum += min * (a[b].sums[2 * j] + a[b].sums[2 * j + 1]);
    }
    const float d = half_to_float(load_as<uint16_t>(w + 2 * r));
    const float dmin = half_to_float(load_as<uint16_t>(w + 32 + 2 * r));
    acc = std::fmaf(static_cast<float>(isum), d * a[b].d, acc);
    acc = std::fmaf(-static_cast<float>(msum), dmin * a[b].d, acc);
  }
  return acc;
}

float dot_q6_k(const uint8_t* w, int64_t r, int64_t k, const std::byte* act) {
  const auto* a = reinterpret_cast<const ActQ8x256*>(act);
  float acc = 0;
  for (int64_t b = 0; b < k / 256; ++b, w += 3360) {
    const auto* scales = reinterpret_cast<const int8_t*>(w + 32);
    int32_t isum = 0;
    for (int64_t j = 0; j < 8; ++j) {
      const uint8_t* low = w + 288 + (j / 2) * 512;
      const uint8_t* high = w + 2336 + (j / 4) * 512;
      int32_t dot[2] = {};  // groups of 16
      for (int64_t i = 0; i < 32; ++i) {
        const int nibble = (interleaved(low, i, r) >> (j % 2 == 0 ? 0 : 4)) & 15;
        const int top = (interleaved(high, i, r) >> (2 * (j % 4))) & 3;
        dot[i / 16] += ((nibble | (top << 4)) - 32) * a[b].q[j * 32 + i];
      }
      isum += scales[(2 * j) * 16 + r] * dot[0] + scales[(2 * j + 1) * 16 + r] * dot[1];
    }
    acc = std::fmaf(static_cast<float>(isum), half_to_float(load_as<uint16_t>(w + 2 * r)) * a[b].d, acc);
  }
  return acc;
}

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
EDGE_GEMV_REF(gemv_q8_0_ref, kQ8_0, dot_q8_0)
EDGE_GEMV_REF(gemv_q4_0_ref, kQ4_0, dot_q4_0)
EDGE_GEMV_REF(gemv_q4_k_ref, kQ4_K, dot_q4_k)
EDGE_GEMV_REF(gemv_q6_k_ref, kQ6_K, dot_q6_k)

}  // namespace edge
