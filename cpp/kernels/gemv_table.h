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
};

using Gemv = std::remove_pointer_t<GemvFn>;
using QuantizeQ8x32 = void(const float* x, int64_t k, ActQ8x32* out);
using QuantizeQ8x256 = void(const float* x, int64_t k, ActQ8x256* out);
using ReadBytes = uint64_t(const std::byte* data, int64_t n_bytes);

// Every ISA names its functions gemv_<format>_<isa>, quantize_<kind>_<isa>, read_bytes_<isa>.
#define EDGE_DECLARE_GEMV_TABLE(isa)                                                                              \
  Gemv gemv_f32_##isa, gemv_f16_##isa, gemv_bf16_##isa, gemv_q8_0_##isa, gemv_q4_0_##isa, gemv_q4_k_##isa,        \
      gemv_q6_k_##isa;                                                                                            \
  QuantizeQ8x32 quantize_q8x32_##isa;                                                                             \
  QuantizeQ8x256 quantize_q8x256_##isa;                                                                           \
  ReadBytes read_bytes_##isa;                                                                                     \
  inline constexpr GemvTable kGemvTable_##isa = {                                                                 \
      {gemv_f32_##isa, gemv_f16_##isa, gemv_bf16_##isa, gemv_q8_0_##isa, gemv_q4_0_##isa, gemv_q4_k_##isa,        \
       gemv_q6_k_##isa},                                                                                          \
      quantize_q8x32_##isa,                                                                                       \
      quantize_q8x256_##isa,                                                                                      \
      read_bytes_##isa}

}  // namespace edge
