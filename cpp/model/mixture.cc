// Mixtures of experts: routing, the experts as they come from the store, and what layers ahead will probably want.
#include <algorithm>
#include <numeric>

#include "model/decoder.h"

namespace edge {

// chosen[expert]: the rows of x that choose it, and with what weight.
Status Decoder::route(const LayerWeights& layer, const float* x, std::vector<std::vector<Choice>>* chosen) {
  const int64_t hidden = config_.hidden_size, n_experts = config_.n_experts;
  const int64_t router_stride = pad16(n_experts), top_k = config_.experts_per_token;
  acts_->set(x, pad16(hidden), n_rows_, hidden);
  const Product router{layer.router, scratch_.router, router_stride};
  EDGE_TRY(linear_.run(*acts_, {&router, 1}));
  chosen->assign(static_cast<size_t>(n_experts), {});
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
    for (int64_t i = 0; i < top_k; ++i) (*chosen)[order[i]].push_back({row, probability[order[i]] / sum});
  }
  return {};
}

// The routers of the next layers on this layer's residual stream, which one layer changes little: they name most of
// what those layers will choose (Eliseev and Mazur, arXiv 2312.17238, section 3.2).
Status Decoder::guess_experts(int64_t layer) {
  const int64_t stride = pad16(config_.hidden_size);
  float* const normed = scratch_.normed + n_rows_ * stride;
  if (2 * n_rows_ > max_rows()) return {};
  std::vector<std::vector<Choice>> chosen;
  std::vector<std::pair<float, int64_t>> likely;
  std::vector<WeightId> weights;
  for (int distance = 1; distance <= WeightStore::kGuessLayers && layer + distance < config_.n_layers; ++distance) {
    const LayerWeights& next = weights_.layers[static_cast<size_t>(layer + distance)];
    if (next.experts.empty() || !store_.guesses(next.experts[0].gate, distance)) continue;
    EDGE_TRY(norm(next.ffn_norm, next.ffn_norm_bias, scratch_.hidden, stride, n_rows_, normed));
    EDGE_TRY(route(next, normed, &chosen));
    likely.clear();
    for (size_t e = 0; e < chosen.size(); ++e) {
      float sum = 0;
      for (const Choice& choice : chosen[e]) sum += choice.weight;
      if (sum > 0) likely.emplace_back(-sum, static_cast<int64_t>(e));
    }
    std::sort(likely.begin(), likely.end());
    weights.clear();
    for (const auto& [minus_sum, e] : likely) {
      const ExpertWeights& expert = next.experts[static_cast<size_t>(e)];
      weights.insert(weights.end(), {expert.gate, expert.up, expert.down});
    }
    store_.guess(weights, distance);
  }
  return {};
}

// projected = sum over each row's top experts of weight * expert(x), added in ascending expert order so that a row's
// result does not depend on which other rows chose the same expert.
Status Decoder::mixture(const LayerWeights& layer, const float* x) {
  const int64_t hidden = config_.hidden_size, stride = pad16(hidden);
  std::vector<std::vector<Choice>> chosen;
  EDGE_TRY(route(layer, x, &chosen));
  // Ascending; first_slot: where the expert's rows begin when every (row, expert) has a slot.
  struct Chosen {
    int64_t expert, first_slot;
  };
  std::vector<Chosen> experts;
  std::vector<ExpectedWeight> weights;
  std::vector<WeightId> gates;
  int64_t n_slots = 0;
  for (int64_t e = 0; e < config_.n_experts; ++e) {
    if (chosen[e].empty()) continue;
    const ExpertWeights& expert = layer.experts[static_cast<size_t>(e)];
    const auto n = static_cast<int32_t>(chosen[e].size());
    weights.insert(weights.end(), {{expert.gate, n}, {expert.up, n}, {expert.down, n}});
    gates.push_back(expert.gate);
    experts.push_back({e, n_slots});
    n_slots += n;
  }
  store_.expect(weights, n_rows_);
  EDGE_TRY(guess_experts(layer.index));

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
