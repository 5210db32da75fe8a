// Feed-forward layers by neuron ("LLM in a flash", arXiv 2312.11514, section 3.2, row-column bundling): gate row, up row
// and down *column* of one neuron lie in one record, so that a neuron that is not active is neither read nor computed.
//
// A row holds hidden values, zero-padded to groups of 256 = 8 lanes of 32. In a group, k = lane*32 + s*4 + b.
//
//   dot row (gate, up)   q8   f16 d[8] (one per lane), then u8 q + 128 at s*32 + lane*4 + b
//                        q4   f16 d[8], then bytes at s'*32 + lane*4 + b, s' < 4: low nibble s = s', high s = s' + 4
//                        f16  value lane*32 + j at j*8 + lane
//   column row (down)    q8   f16 d[8] (one per 32 values), then int8 q in order
//                        q4   f16 d[8], then 16 bytes per 32 values: low nibble value j, high nibble value 16 + j
//                        f16  in order
//
// Values are d * q; q4 stores q + 8. A lane of a register is a lane of the group, so a dot row needs one horizontal sum,
// of fixed shape. Every ISA gives the bits of neuron_ref.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format.h"

namespace edge {

// Activations for q8 and q4 dot rows: blocks of 32 as quantize_q8x32 makes them, laid out as the rows are.
struct NeuronActGroup {
  float d[8];
  int32_t sum[8];
  int8_t q[256];
};

// Bytes of one activation row: NeuronActGroup per group, or for f16 the f32 values in the order of the row.
inline int64_t neuron_act_bytes(WeightFormat format, int64_t hidden) {
  const auto group_bytes = static_cast<int64_t>(format == WeightFormat::kNeuronF16 ? 4 * kNeuronGroupValues
                                                                                   : sizeof(NeuronActGroup));
  return neuron_groups(hidden) * group_bytes;
}

// x [hidden] -> one activation row of neuron_act_bytes.
using NeuronActFn = void (*)(const float* x, int64_t hidden, std::byte* act);

// out[m * out_stride + i] = dot(rows[i], activation row m), i < n, m < n_x; rows of activations act_stride bytes apart.
// rows[i] points at a dot row, at any address: a part of a record. Per lane, over the groups in order:
// acc += (d_w * d_x) * float(integer dot), or for f16 acc += w * x over j; product and sum rounded separately. Lanes are
// added as ((a0+a4) + (a2+a6)) + ((a1+a5) + (a3+a7)). The bits of an output do not depend on n or n_x.
using NeuronDotFn = void (*)(const std::byte* const* rows, int64_t n, int64_t hidden, const std::byte* acts,
                             int64_t act_stride, int64_t n_x, float* out, int64_t out_stride);

// For i < n in order, unless a[i] is zero: out[j] += (a[i] * d) * q[j] (f16: a[i] * value), j in [begin, end); product
// and sum rounded separately. begin and end are multiples of 32, end at most hidden rounded up to one: out has room for
// that many. A zero a[i] is passed over whatever the column holds, so leaving it out of the list changes no bit.
// Several outputs from the same columns: give each the columns in runs that fit the second cache, run by run.
using NeuronAxpyFn = void (*)(const std::byte* const* cols, const float* a, int64_t n, int64_t begin, int64_t end,
                              float* out);

// One ISA's kernels, indexed by neuron_index(format).
struct NeuronKernels {
  NeuronActFn act[kNeuronFormats];
  NeuronDotFn dot[kNeuronFormats];
  NeuronAxpyFn axpy[kNeuronFormats];
};

}  // namespace edge
