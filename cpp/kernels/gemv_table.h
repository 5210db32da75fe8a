// One ISA's matrix products and activation quantisers, as the registry collects them.
#pragma once

#include <type_traits>

#include "kernels/kernels.h"

namespace edge {

struct GemvTable {
  GemvFn gemv[kTileFormats];  // indexed by WeightFormat
  void (*quantize_q8x32)(const float* x, int64_t k, ActQ8x32* out);
  void (*quantize_q8x256)(const float* x, int64_t k, ActQ8x256* out);
  // Reads n_bytes (a multiple of 1024) as fast as this ISA can; the value only keeps the loads alive.
  uint64_t (*read_bytes)(const std::byte* data, int64_t n_bytes);
  // Multiplies and adds int8 in registers as fast as this ISA can; returns how many multiply-adds n_steps were.
  int64_t (*multiply_int8)(int64_t n_steps);
};

using Gemv = std::remove_pointer_t<GemvFn>;
using QuantizeQ8x32 = void(const float* x, int64_t k, ActQ8x32* out);
using QuantizeQ8x256 = void(const float* x, int64_t k, ActQ8x256* out);
using ReadBytes = uint64_t(const std::byte* data, int64_t n_bytes);
using MultiplyInt8 = int64_t(int64_t n_steps);

// Every ISA names its functions gemv_<format>_<isa>, quantize_<kind>_<isa>, read_bytes_<isa>,
// multiply_int8_<isa>.
#define EDGE_DECLARE_GEMV(isa, code, enumerator, name, ...) Gemv gemv_##name##_##isa;
#define EDGE_SET_GEMV(isa, code, enumerator, name, ...) table.gemv[code] = gemv_##name##_##isa;
#define EDGE_DECLARE_GEMV_TABLE(isa)                     \
  EDGE_TILE_FORMATS(EDGE_DECLARE_GEMV, isa)              \
  QuantizeQ8x32 quantize_q8x32_##isa;                    \
  QuantizeQ8x256 quantize_q8x256_##isa;                  \
  ReadBytes read_bytes_##isa;                            \
  MultiplyInt8 multiply_int8_##isa;                      \
  inline constexpr GemvTable kGemvTable_##isa = [] {     \
    GemvTable table{};                                   \
    EDGE_TILE_FORMATS(EDGE_SET_GEMV, isa)                \
    table.quantize_q8x32 = quantize_q8x32_##isa;         \
    table.quantize_q8x256 = quantize_q8x256_##isa;       \
    table.read_bytes = read_bytes_##isa;                 \
    table.multiply_int8 = multiply_int8_##isa;           \
    return table;                                        \
  }()

// An ISA that has quantised products of its own and all else from another one.
#define EDGE_DECLARE_QUANTISED_GEMV(isa)                 \
  EDGE_Q8X32_FORMATS(EDGE_DECLARE_GEMV, isa)             \
  EDGE_Q8X256_FORMATS(EDGE_DECLARE_GEMV, isa)            \
  MultiplyInt8 multiply_int8_##isa
#define EDGE_DECLARE_GEMV_TABLE_OVER(isa, base)          \
  EDGE_DECLARE_QUANTISED_GEMV(isa);                      \
  inline constexpr GemvTable kGemvTable_##isa = [] {     \
    GemvTable table = kGemvTable_##base;                 \
    EDGE_Q8X32_FORMATS(EDGE_SET_GEMV, isa)               \
    EDGE_Q8X256_FORMATS(EDGE_SET_GEMV, isa)              \
    table.multiply_int8 = multiply_int8_##isa;           \
    return table;                                        \
  }()

}  // namespace edge
