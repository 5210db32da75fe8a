// The function of a feed-forward layer's gate.
#pragma once

#include "kernels/kernels.h"
#include "model/decoder_config.h"

namespace edge {

// out[i] = act(gate[i]) * up[i], or act(gate[i]) without `up`; out may be gate or up.
inline void activate(const Kernels& kernels, Activation activation, const float* gate, const float* up, int64_t n,
                     float* out) {
  switch (activation) {
    case Activation::kSilu: kernels.silu_mul(gate, up, n, out); break;
    case Activation::kRelu: kernels.relu_mul(gate, up, n, out); break;
    case Activation::kGelu: kernels.gelu_mul(gate, up, n, out); break;
    case Activation::kGeluTanh: kernels.gelu_tanh_mul(gate, up, n, out); break;
  }
}

}  // namespace edge
