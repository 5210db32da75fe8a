#include <algorithm>

#include "model/decoder.h"

namespace edge {

void Decoder::activate_rows(const float* gate, const float* up, int64_t n_rows, int64_t n, float* out) {
  const int64_t stride = pad16(n);
  // An exponential is worth some four steps.
  pool_.parallel(n_rows, row_grain(4 * n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      activate(kernels_, config_.activation, gate + row * stride, up == nullptr ? nullptr : up + row * stride, n,
               out + row * stride);
    }
  });
}

// out[n_rows][pad16(hidden)] = down(act(gate(x)) * up(x)), or down(act(up(x))) when the FFN has no gate.
Status Decoder::ffn(const LayerWeights& layer, const float* x, int64_t n_rows, float* out) {
  const int64_t hidden = config_.hidden_size;
  const int64_t inner = directory_.entry(layer.up).rows;
  acts_->set(x, pad16(hidden), n_rows, hidden);
  // In file order, which is the order a stream delivers.
  const Product inputs[] = {{layer.gate, scratch_.gate, pad16(inner), layer.gate_bias},
                            {layer.up, scratch_.up, pad16(inner), layer.up_bias}};
  EDGE_TRY(linear_.run(*acts_, std::span(inputs).subspan(config_.gated ? 0 : 1)));
  const float* gate = config_.gated ? scratch_.gate : scratch_.up;
  if (watch_ffn && layer.index >= 0) watch_ffn({layer.index, 0, n_rows, x, scratch_.hidden, gate});
  activate_rows(gate, config_.gated ? scratch_.up : nullptr, n_rows, inner, scratch_.gate);
  acts_->set(scratch_.gate, pad16(inner), n_rows, inner);
  const Product down{layer.down, out, pad16(hidden), layer.down_bias};
  return linear_.run(*acts_, {&down, 1});
}

}  // namespace edge
