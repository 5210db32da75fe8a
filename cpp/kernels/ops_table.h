// The float operators of one ISA: the members of `Kernels` that are the same for every weight format.
// One source (ops_impl.h) is compiled once per ISA; every table gives the same bits.
#pragma once

#include "kernels/kernels.h"

namespace edge {

struct OpsTable {
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out);
  void (*rope)(float* x, const float* cos, const float* sin, int64_t n_rotary);
  // up == nullptr stands for 1: a feed-forward without a gate.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*relu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*gelu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*gelu_tanh_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*add)(const float* x, int64_t n, float* into);
  void (*scale_add)(const float* x, float scale, int64_t n, float* into);
  void (*beyond)(const float* x, const float* limit, int64_t n, uint64_t* out);
  void (*softmax)(float* x, int64_t n);
  void (*attention_begin)(const AttentionArgs& args);
  void (*attention_scores)(const AttentionArgs& args);
  void (*attention_weigh)(const AttentionArgs& args);
  void (*attention_values)(const AttentionArgs& args);
  void (*to_f16)(const float* x, int64_t n, uint16_t* out);
};

const OpsTable& ops_table_ref();
// Compiled on x86-64 only; the caller has checked that the machine runs the ISA.
const OpsTable& ops_table_avx2();
const OpsTable& ops_table_avx512vnni();
// Compiled on aarch64 only.
const OpsTable& ops_table_neon();

}  // namespace edge
