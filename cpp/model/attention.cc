#include <algorithm>

#include "model/decoder.h"

namespace edge {

Status Decoder::attention(int64_t index) {
  const LayerWeights& layer = weights_.layers[static_cast<size_t>(index)];
  const int64_t hidden = config_.hidden_size, q_dim = config_.q_dim(), kv_dim = config_.kv_dim();
  EDGE_TRY(norm(layer.attn_norm, layer.attn_norm_bias, scratch_.hidden, pad16(hidden), n_rows_, scratch_.normed));
  acts_->set(scratch_.normed, pad16(hidden), n_rows_, hidden);
  const Product qkv[] = {{layer.q, scratch_.q, pad16(q_dim), layer.q_bias},
                         {layer.k, scratch_.k, pad16(kv_dim), layer.k_bias},
                         {layer.v, scratch_.v, pad16(kv_dim), layer.v_bias}};
  EDGE_TRY(linear_.run(*acts_, qkv));
  EDGE_TRY(rotate_and_store(index));
  EDGE_TRY(attend_any(index));
  acts_->set(scratch_.attended, pad16(q_dim), n_rows_, q_dim);
  const Product out{layer.o, scratch_.projected, pad16(hidden), layer.o_bias};
  EDGE_TRY(linear_.run(*acts_, {&out, 1}));
  kernels_.add(scratch_.projected, n_rows_ * pad16(hidden), scratch_.hidden);
  return {};
}

Status Decoder::attend_any(int64_t index) {
  const bool streamed = options_.score_rows > 0;
  const int64_t stride = pad16(config_.q_dim());
  if (tiles_ != nullptr) {
    if (streamed) return tiles_->attend_streamed(batch_rows(), index, scratch_.q, scratch_.attended, stride);
    tiles_->attend(batch_rows(), index, scratch_.q, scratch_.attended, stride);
    return {};
  }
  if (streamed) return attend_streamed(index, *homes_.front().kv);
  row_attention_->attend(batch_rows(), index, scratch_.q, scratch_.attended, stride);
  return {};
}

Status Decoder::rotate_and_store(int64_t index) {
  const LayerWeights& layer = weights_.layers[static_cast<size_t>(index)];
  const int64_t head_dim = config_.head_dim, q_dim = config_.q_dim(), kv_dim = config_.kv_dim();
  const int64_t half = static_cast<int64_t>(config_.rope_inv_freq.size());
  EDGE_ASSIGN(const float* q_norm, linear_.vector(layer.q_norm));
  EDGE_ASSIGN(const float* k_norm, linear_.vector(layer.k_norm));

  const auto clip = [&](float* x, int64_t n) {
    if (config_.clip_qkv <= 0) return;
    for (int64_t i = 0; i < n; ++i) x[i] = std::clamp(x[i], -config_.clip_qkv, config_.clip_qkv);
  };
  const auto prepare = [&](float* x, int64_t dim, const float* weight, int64_t row) {
    if (config_.qk_norm == QkNorm::kFull) kernels_.rms_norm(x, weight, config_.norm_eps, dim, x);
    clip(x, dim);
    for (int64_t head = 0; head < dim; head += head_dim) {
      if (config_.qk_norm == QkNorm::kHead) kernels_.rms_norm(x + head, weight, config_.norm_eps, head_dim, x + head);
      if (half > 0) kernels_.rope(x + head, scratch_.cos + row * half, scratch_.sin + row * half, 2 * half);
    }
  };
  pool_.parallel(n_rows_, row_grain(q_dim + 2 * kv_dim), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      prepare(scratch_.q + row * pad16(q_dim), q_dim, q_norm, row);
      prepare(scratch_.k + row * pad16(kv_dim), kv_dim, k_norm, row);
      float* v = scratch_.v + row * pad16(kv_dim);
      clip(v, kv_dim);
      if (tiles_ != nullptr) {
        tiles_->put(batch_rows(), index, row, scratch_.q + row * pad16(q_dim), scratch_.k + row * pad16(kv_dim), v);
        continue;
      }
      const RowHome& home = homes_[static_cast<size_t>(row)];
      kernels_.to_f16(scratch_.k + row * pad16(kv_dim), kv_dim, home.kv->key(index, home.slot(row)));
      kernels_.to_f16(v, kv_dim, home.kv->value(index, home.slot(row)));
    }
  });
  return {};
}

}  // namespace edge
