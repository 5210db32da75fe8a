// The table of kernels: chosen once per process, one column per ISA. Every ISA gives the same bits as ref.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"
#include "kernels/format.h"
#include "kernels/neuron.h"
#include "kernels/tile_attention.h"

namespace edge {

inline ActKind act_kind(WeightFormat format) {
  return is_tile_format(format) ? traits(format).act : ActKind::kF32;
}

// One activation block: values are q * d. sum(s) let unsigned weight nibbles be offset after the dot product.
struct ActQ8x32 {
  float d;
  int32_t sum;
  int8_t q[32];
};
struct ActQ8x256 {
  float d;
  int32_t pad;
  int16_t sums[16];  // of 16 values each
  int8_t q[256];
};

inline int64_t act_row_bytes(ActKind kind, int64_t k) {
  switch (kind) {
    case ActKind::kF32: return k * 4;
    case ActKind::kQ8x32: return k / 32 * static_cast<int64_t>(sizeof(ActQ8x32));
    case ActKind::kQ8x256: return k / 256 * static_cast<int64_t>(sizeof(ActQ8x256));
  }
  return 0;
}

// y[m * y_stride + row] = dot(W[row, :], x[m, :]) for rows of tiles [tile_begin, tile_end), m in [0, n_rows).
// `tiles` points at tile 0 of the matrix; acts at activation row 0, rows act_stride bytes apart (kind act_kind(format)).
// y holds 16 values per tile: a matrix whose row count is no multiple of 16 writes the padding rows too.
// A row's bits do not depend on n_rows. Any n_rows >= 1 is taken; a tile is decoded once for up to 8 rows (16 by i8mm).
using GemvFn = void (*)(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride, int64_t n_rows,
                        float* y, int64_t y_stride, int64_t tile_begin, int64_t tile_end);

// Attention over one KV head for `group` query heads that share it, of one query row or of several that see the same keys.
// Definition: ops_attention.h.
struct AttentionArgs {
  const float* q;              // [group, head_dim]
  int64_t group;
  int64_t head_dim;
  const uint16_t* const* k;    // visible keys in order: k[i] + k_at -> f16 [head_dim]
  const uint16_t* const* v;    // visible values in order
  int64_t n_visible;
  float scale;
  float* scores;               // scratch [group, n_visible], rows `stride` floats apart
  float* out;                  // [group, head_dim]
  int64_t stride;
  // attention_scores and attention_values: k or v holds keys [first, first + n) of the visible ones.
  int64_t first = 0;
  int64_t n = 0;
  int64_t k_at = 0;
  int64_t v_at = 0;
};

struct Kernels {
  const char* isa;
  GemvFn gemv[kTileFormats];
  NeuronKernels neuron;
  void (*quantize_q8x32)(const float* x, int64_t k, ActQ8x32* out);
  void (*quantize_q8x256)(const float* x, int64_t k, ActQ8x256* out);
  // out = x / rms(x) * weight ; out = (x - mean) / std * weight + bias (bias may be null). In place allowed.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out);
  // Rotate-half: pairs (i, i + n_rotary/2), angle position * inv_freq[i]; cos/sin are given, [n_rotary/2] each.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t n_rotary);
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);  // silu(gate) * up
  void (*relu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*gelu_mul)(const float* gate, const float* up, int64_t n, float* out);       // erf form; up null = 1
  void (*gelu_tanh_mul)(const float* gate, const float* up, int64_t n, float* out);  // tanh form; up null = 1
  void (*add)(const float* x, int64_t n, float* into);                               // into += x
  void (*scale_add)(const float* x, float scale, int64_t n, float* into);            // into += scale * x
  // Bit i % 64 of out[i / 64]: unless |x[i]| <= limit[i] (limit null: zeros), so what is not a number is beyond. Bits past
  // n are 0.
  void (*beyond)(const float* x, const float* limit, int64_t n, uint64_t* out);
  void (*softmax)(float* x, int64_t n);
  // Attention in steps: begin, scores of every range, weigh, values of every range in order. `scores` and `out` hold the
  // state between them; a head's bits depend neither on the ranges nor on the heads beside it.
  void (*attention_begin)(const AttentionArgs& args);
  void (*attention_scores)(const AttentionArgs& args);
  void (*attention_weigh)(const AttentionArgs& args);
  void (*attention_values)(const AttentionArgs& args);
  void (*to_f16)(const float* x, int64_t n, uint16_t* out);  // round to nearest even
  TileTable tiles;  // attention over keys and values of fewer bits
};

struct IsaInfo {
  std::string name;
  bool available = false;
  std::string reason;  // why not, when not available
};

// All ISAs compiled into this binary, best first, with whether this machine (and OS) can run them.
std::vector<IsaInfo> list_isas();

// The table of one ISA; kUnsupported names the reason.
Result<const Kernels*> kernels_for(const std::string& isa);

// EDGE_ISA from the environment, else the best one available. kBadArgument lists the names when EDGE_ISA is unknown.
Result<const Kernels*> default_kernels();

}  // namespace edge
