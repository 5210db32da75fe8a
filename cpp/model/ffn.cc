#include <algorithm>
#include <numeric>

#include "model/decoder.h"

namespace edge {

void Decoder::activate_rows(const float* gate, const float* up, int64_t n_rows, int64_t n, float* out) {
  const int64_t stride = pad16(n);
  pool_.parallel(n_rows, 1, [&](int64_t begin, int64_t end, int) {
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

// projected = sum over each row's top experts of weight * expert(x), added in ascending expert order so that a row's
// result does not depend on which other rows chose the same expert.
Status Decoder::mixture(const LayerWeights& layer, const float* x) {
  const int64_t hidden = config_.hidden_size, stride = pad16(hidden);
  const int64_t n_experts = config_.n_experts, router_stride = pad16(n_experts), top_k = config_.experts_per_token;
  acts_->set(x, stride, n_rows_, hidden);
  const Product router{layer.router, scratch_.router, router_stride};
  EDGE_TRY(linear_.run(*acts_, {&router, 1}));

  struct Choice {
    int64_t row;
    float weight;
  };
  std::vector<std::vector<Choice>> chosen(static_cast<size_t>(n_experts));
  std::vector<int64_t> order(static_cast<size_t>(n_experts));
  for (int64_t row = 0; row < n_rows_; ++row) {
    float* probability = scratch_.router + row * router_stride;
    kernels_.softmax(probability, n_experts);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
      return probability[a] != probability[b] ? probability[a] > probability[b] : a < b;
    });
    float sum = 1.0f;
    if (config_.norm_topk_prob) {
      sum = 0.0f;
      for (int64_t i = 0; i < top_k; ++i) sum += probability[order[i]];
    }
    for (int64_t i = 0; i < top_k; ++i) chosen[order[i]].push_back({row, probability[order[i]] / sum});
  }
  // Ascending; first_slot: where the expert's rows begin when every (row, expert) has a slot.
  struct Chosen {
    int64_t expert, first_slot;
  };
  std::vector<Chosen> experts;
  std::vector<ExpectedWeight> weights;
  std::vector<WeightId> gates;
  int64_t n_slots = 0;
  for (int64_t e = 0; e < n_experts; ++e) {
    if (chosen[e].empty()) continue;
    const ExpertWeights& expert = layer.experts[static_cast<size_t>(e)];
    const auto n = static_cast<int32_t>(chosen[e].size());
    weights.insert(weights.end(), {{expert.gate, n}, {expert.up, n}, {expert.down, n}});
    gates.push_back(expert.gate);
    experts.push_back({e, n_slots});
    n_slots += n;
  }
  store_.expect(weights, n_rows_);

  const auto run = [&](int64_t e, float* out) -> Status {
    const std::vector<Choice>& rows = chosen[static_cast<size_t>(e)];
    const ExpertWeights& expert = layer.experts[static_cast<size_t>(e)];
    for (size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(x + rows[i].row * stride, hidden, scratch_.expert_in + static_cast<int64_t>(i) * stride);
    }
    LayerWeights dense;
    dense.gate = expert.gate;
    dense.up = expert.up;
    dense.down = expert.down;
    return ffn(dense, scratch_.expert_in, static_cast<int64_t>(rows.size()), out);
  };
  const auto add = [&](int64_t e, const float* out) {
    const std::vector<Choice>& rows = chosen[static_cast<size_t>(e)];
    for (size_t i = 0; i < rows.size(); ++i) {
      kernels_.scale_add(out + static_cast<int64_t>(i) * stride, rows[i].weight, hidden,
                         scratch_.projected + rows[i].row * stride);
    }
  };
  std::fill_n(scratch_.projected, n_rows_ * stride, 0.0f);
  if (n_slots > max_rows()) {
    // Too many for slots (a prompt chunk): in ascending order, each added at once.
    for (const Chosen& one : experts) {
      EDGE_TRY(run(one.expert, scratch_.expert_out));
      add(one.expert, scratch_.expert_out);
    }
    return {};
  }
  // What is in memory first, while the rest is read; then as it lands.
  std::vector<Chosen> left = experts;
  while (!left.empty()) {
    const size_t i = store_.first_ready(gates);
    EDGE_TRY(run(left[i].expert, scratch_.expert_out + left[i].first_slot * stride));
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(i));
    gates.erase(gates.begin() + static_cast<std::ptrdiff_t>(i));
  }
  for (const Chosen& one : experts) add(one.expert, scratch_.expert_out + one.first_slot * stride);
  return {};
}

}  // namespace edge
