#include "store/expert_policy.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

namespace edge {
namespace {

// Found by simulation over recorded traces of three models (bench/experts.py); flat around these values.
constexpr double kRecentDecay = 0.5;         // half-life 1 token
constexpr double kRateDecay = 0.9438743127;  // half-life 12 tokens
constexpr double kRecentShare = 0.3, kRateShare = 0.3, kFollowShare = 2.0;
constexpr double kAlikeDecay = 0.9170040432;  // half-life 8 layers
constexpr double kFollowDecay = 0.67;         // what came one batch later counts so much more than two later
// What a whole pass of distance weighs against the expected number of passes until the next choice.
constexpr double kDistance = 4.0;
constexpr double kLeastChance = 0.05;

// Sharpens a resemblance relative to the best one: near exp(16 x) for x in [-1, 0], by products alone.
double sharpen(double x) {
  double y = 1 + x;
  for (int i = 0; i < 4; ++i) y *= y;
  return y;
}

}  // namespace

ExpertPolicy::ExpertPolicy(int n_layers, int n_experts)
    : n_experts_(n_experts), words_((n_experts + 63) / 64), layers_(static_cast<size_t>(n_layers)),
      alike_(kHistory), follows_(static_cast<size_t>(n_experts)) {
  const auto experts = static_cast<size_t>(n_experts);
  for (Layer& layer : layers_) {
    layer.recent.resize(experts);
    layer.rate.resize(experts);
    layer.chance.resize(experts);
    layer.choices.resize(static_cast<size_t>(kHistory * words_));
    layer.n_chosen.resize(kHistory);
  }
}

void ExpertPolicy::visit(int layer_index, std::span<const ExpertUse> chosen, int64_t n_rows) {
  here_ = layer_index;
  Layer& layer = layers_[static_cast<size_t>(layer_index)];
  n_rows = std::max<int64_t>(n_rows, 1);
  const auto rows = static_cast<double>(n_rows);
  const double recent_left = std::pow(kRecentDecay, rows), rate_left = std::pow(kRateDecay, rows);
  for (int e = 0; e < n_experts_; ++e) {
    layer.recent[e] *= recent_left;
    layer.rate[e] *= rate_left;
  }
  const int slot = static_cast<int>(layer.n_visits % kHistory);
  uint64_t* const bits = &layer.choices[static_cast<size_t>(slot * words_)];
  std::fill_n(bits, words_, 0);
  for (const auto& [e, e_rows] : chosen) {
    layer.recent[e] += (1 - recent_left) * (e_rows / rows);
    layer.rate[e] += (1 - rate_left) * (e_rows / rows);
    bits[e / 64] |= uint64_t{1} << (e % 64);
  }
  layer.n_chosen[slot] = static_cast<int32_t>(chosen.size());
  ++layer.n_visits;
  layer.n_tokens += n_rows;
  const bool follows = follow(layer, chosen.size());
  const double recent_norm = 1 - std::pow(kRecentDecay, static_cast<double>(layer.n_tokens));
  const double rate_norm = 1 - std::pow(kRateDecay, static_cast<double>(layer.n_tokens));
  // While nothing followed batches of this layer yet, how often stands for that too: layers are compared.
  const double often = follows ? 1 : 1 + kFollowShare / (kRecentShare + kRateShare);
  double sum = 0;
  for (int e = 0; e < n_experts_; ++e) {
    layer.chance[e] = static_cast<float>(often * (kRecentShare * layer.recent[e] / recent_norm +
                                                  kRateShare * layer.rate[e] / rate_norm) +
                                         kFollowShare * follows_[e]);
    sum += layer.chance[e];
  }
  mean_chance_ = sum / n_experts_;
}

// follows_[e]: the share of what followed batches like this one, in this layer, that was expert e. False: nothing did yet.
bool ExpertPolicy::follow(Layer& layer, size_t n_chosen) {
  const int64_t newest = layer.n_visits - 1;
  const int n_lags = static_cast<int>(std::min<int64_t>(newest, kHistory - 1));
  const auto slot = [&](int lag) { return static_cast<int>((newest - lag) % kHistory); };
  const uint64_t* const now = &layer.choices[static_cast<size_t>(slot(0) * words_)];
  const auto n_now = static_cast<double>(n_chosen);
  alike_norm_ = kAlikeDecay * alike_norm_ + 1;
  double best = 0;
  for (int lag = 1; lag < kHistory; ++lag) {
    int common = 0;
    if (lag <= n_lags) {
      const uint64_t* const then = &layer.choices[static_cast<size_t>(slot(lag) * words_)];
      for (int i = 0; i < words_; ++i) common += std::popcount(now[i] & then[i]);
      // A prompt chunk chooses many: resembling it says little.
      const double most = std::max(n_now, static_cast<double>(layer.n_chosen[slot(lag)]));
      alike_[lag] = kAlikeDecay * alike_[lag] + common / most;
      best = std::max(best, alike_[lag]);
    } else {
      alike_[lag] *= kAlikeDecay;
    }
  }
  // weight[lag] = sum over j >= 1 of kFollowDecay^(j-1) * likeness of the batch j before that one.
  std::array<double, kHistory> weight{};
  double after = 0, sum = 0;
  for (int lag = n_lags; lag >= 0; --lag) {
    weight[lag] = after;
    sum += after;
    const double like = lag > 0 ? sharpen((alike_[lag] - best) / alike_norm_) : 0;
    after = kFollowDecay * after + like;
  }
  std::fill(follows_.begin(), follows_.end(), 0.0);
  if (sum <= 0) return false;
  for (int lag = 0; lag <= n_lags; ++lag) {
    const uint64_t* const then = &layer.choices[static_cast<size_t>(slot(lag) * words_)];
    const double share = weight[lag] / sum * std::min(1.0, n_now / layer.n_chosen[slot(lag)]);
    for (int i = 0; i < words_; ++i) {
      for (uint64_t left = then[i]; left != 0; left &= left - 1) follows_[i * 64 + std::countr_zero(left)] += share;
    }
  }
  return true;
}

double ExpertPolicy::worth(int layer, int expert) const {
  const int n_layers = static_cast<int>(layers_.size());
  const int ahead = (layer - here_ - 1 + n_layers) % n_layers + 1;
  const Layer& its = layers_[static_cast<size_t>(layer)];
  const double chance = its.n_visits > 0 ? its.chance[static_cast<size_t>(expert)] : mean_chance_;
  return -(kDistance * ahead / n_layers + 1 / (chance + kLeastChance));
}

}  // namespace edge
