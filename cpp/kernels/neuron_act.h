// Activation rows for neuron dot rows, shared by the ISAs. Internal linkage: compiled under several flags.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"

namespace edge {
namespace {

// kQuantize is the ISA's quantize_q8x32. A partly filled block is quantised as if zeros followed.
template <void (*kQuantize)(const float*, int64_t, ActQ8x32*)>
inline void neuron_act_q8(const float* x, int64_t hidden, std::byte* act) {
  auto* groups = reinterpret_cast<NeuronActGroup*>(act);
  for (int64_t g = 0; g < neuron_groups(hidden); ++g) {
    const int64_t n = std::min(kNeuronGroupValues, hidden - g * kNeuronGroupValues);
    const float* values = x + g * kNeuronGroupValues;
    float padded[kNeuronGroupValues];
    if (n < kNeuronGroupValues) {
      std::memcpy(padded, values, static_cast<size_t>(n) * sizeof(float));
      std::fill(padded + n, padded + kNeuronGroupValues, 0.0f);
      values = padded;
    }
    ActQ8x32 blocks[8];
    kQuantize(values, kNeuronGroupValues, blocks);
    for (int lane = 0; lane < 8; ++lane) {
      groups[g].d[lane] = blocks[lane].d;
      groups[g].sum[lane] = blocks[lane].sum;
      for (int s = 0; s < 8; ++s) std::memcpy(groups[g].q + s * 32 + lane * 4, blocks[lane].q + s * 4, 4);
    }
  }
}

inline void neuron_act_f16(const float* x, int64_t hidden, std::byte* act) {
  auto* out = reinterpret_cast<float*>(act);
  const int64_t padded = neuron_groups(hidden) * kNeuronGroupValues;
  for (int64_t group = 0; group < padded; group += kNeuronGroupValues) {
    const int64_t n = std::min(kNeuronGroupValues, hidden - group);
    for (int64_t k = 0; k < kNeuronGroupValues; ++k) {
      out[group + k % 32 * 8 + k / 32] = k < n ? x[group + k] : 0.0f;
    }
  }
}

}  // namespace
}  // namespace edge
