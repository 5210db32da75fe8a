#include "sample/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sample/philox.h"

namespace edge {
namespace {

// argmax of ln w + g as argmin of E / w with E = e^-g exponential: the logarithm is taken only where E can win.
class Race {
 public:
  Race(uint64_t seed, uint64_t position) : seed_(seed), position_(position) {}

  void enter(int32_t id, double weight) {
    // E = -log(1 - u) > u, and u is at least 2^-53; the margin covers the rounding of both sides.
    const double bound = best_ * weight * (1 + 1e-9);
    if (!(bound > 0x1p-53)) return;
    const double u = philox_uniform(seed_, position_, id);
    if (u >= bound) return;
    const double time = exponential(u) / weight;
    if (time < best_ || (time == best_ && id < winner_)) {
      best_ = time;
      winner_ = id;
    }
  }
  int32_t winner() const { return winner_; }

 private:
  uint64_t seed_;
  uint64_t position_;
  double best_ = std::numeric_limits<double>::infinity();
  int32_t winner_ = -1;
};

Status check_max(float max, uint64_t position) {
  if (std::isfinite(max)) return {};
  return error(Code::kCorrupt, "logits are not finite at position %llu: expected a largest logit, found %s",
               static_cast<unsigned long long>(position), std::isnan(max) ? "NaN or +inf" : "-inf for every token");
}

}  // namespace

double gumbel(uint64_t seed, uint64_t position, int32_t id) {
  return -portable_log(exponential(philox_uniform(seed, position, id)));
}

Sampler::Sampler(SamplingConfig config, int64_t vocab_size, Budget* budget)
    : config_(std::move(config)), vocab_size_(vocab_size), status_(config_.validate(vocab_size)), budget_(budget) {
  if (budget_ == nullptr) {
    own_budget_ = std::make_unique<Budget>(std::numeric_limits<uint64_t>::max());
    budget_ = own_budget_.get();
  }
  if (config_.top_k >= vocab_size) config_.top_k = 0;
}

Status Sampler::reserve() {
  const bool draws = config_.temperature > 0;
  const bool all = draws && config_.top_k == 0 && (config_.typical_p < 1 || config_.top_p < 1);
  int64_t n_candidates = all ? vocab_size_ : 0;
  if (draws && config_.top_k > 0) n_candidates = top_k_room(config_.top_k, vocab_size_);
  if (config_.n_logprobs > 0) n_candidates = std::max(n_candidates, top_k_room(config_.n_logprobs, vocab_size_));
  if (n_candidates > 0 && candidates_.data() == nullptr) {
    EDGE_ASSIGN(candidates_, budget_->reserve(static_cast<uint64_t>(n_candidates) * sizeof(Candidate), "sampler"));
  }
  if ((config_.has_penalties() || !config_.logit_bias.empty()) && changes_.data() == nullptr) {
    EDGE_ASSIGN(changes_, budget_->reserve(static_cast<uint64_t>(vocab_size_) * sizeof(Change), "sampler"));
  }
  return {};
}

Status Sampler::check(std::span<const float> logits, std::span<const int32_t> window) const {
  if (static_cast<int64_t>(logits.size()) != vocab_size_) {
    return error(Code::kBadArgument, "logits: expected %lld values, found %zu", static_cast<long long>(vocab_size_),
                 logits.size());
  }
  for (const int32_t id : window) {
    if (id >= 0 && id < vocab_size_) continue;
    return error(Code::kBadArgument, "history: expected token ids in [0, %lld), found %d",
                 static_cast<long long>(vocab_size_), id);
  }
  return {};
}

void Sampler::adjust(std::span<float> logits, std::span<const int32_t> window) {
  Change* changes = changes_.as<Change>();
  for (const auto& [id, bias] : config_.logit_bias) changes[id].logit = logits[static_cast<size_t>(id)];
  for (const int32_t id : window) {
    changes[id].logit = logits[static_cast<size_t>(id)];
    ++changes[id].count;
  }
  for (const auto& [id, bias] : config_.logit_bias) logits[static_cast<size_t>(id)] += bias;
  for (const int32_t id : window) {
    if (changes[id].count == 0) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / config_.repetition_penalty : logit * config_.repetition_penalty;
    logit -= config_.presence_penalty + config_.frequency_penalty * static_cast<float>(changes[id].count);
    changes[id].count = 0;
  }
}

void Sampler::restore(std::span<float> logits, std::span<const int32_t> window) const {
  const Change* changes = changes_.as<Change>();
  for (const auto& [id, bias] : config_.logit_bias) logits[static_cast<size_t>(id)] = changes[id].logit;
  for (const int32_t id : window) logits[static_cast<size_t>(id)] = changes[id].logit;
}

// What top-k, typical, top-p and min-p leave. Only called when the first three leave something out.
std::span<Candidate> Sampler::filter(std::span<const float> logits, const Weighting& weight) {
  Candidate* room = candidates_.as<Candidate>();
  size_t n = 0;
  double total = 0;  // of what top-p looks at
  if (config_.top_k > 0) {
    n = keep_top_k(logits, config_.top_k, room);
  } else {
    double cut = -std::numeric_limits<double>::infinity();
    if (config_.typical_p == 1) {
      // Tokens whose weights could not add up to half of what top-p leaves out need not be looked at.
      total = exp_sum(logits, weight.max, weight.temperature);
      const double least = (1.0 - static_cast<double>(config_.top_p)) * total / static_cast<double>(vocab_size_) / 2;
      cut = static_cast<double>(weight.max) + weight.temperature * portable_log(least);
    }
    for (size_t id = 0; id < logits.size(); ++id) {
      if (static_cast<double>(logits[id]) > cut) room[n++] = {logits[id], static_cast<int32_t>(id)};
    }
  }
  if (config_.typical_p < 1) n = keep_typical({room, n}, weight, static_cast<double>(config_.typical_p));
  if (config_.top_p < 1) {
    if (total == 0) total = total_weight({room, n}, weight);
    n = keep_top_p({room, n}, weight, total, static_cast<double>(config_.top_p));
  }
  if (config_.min_p > 0) n = keep_min_p({room, n}, weight, static_cast<double>(config_.min_p));
  return {room, n};
}

int32_t Sampler::draw(std::span<const float> logits, float max, uint64_t position) {
  const Weighting weight(max, config_.temperature);
  Race race(config_.seed, position);
  if (!filters()) {
    const double least = static_cast<double>(config_.min_p);
    for (size_t i = 0; i < logits.size(); i += 2) {
      const Double2 weights = weight(logits[i], logits[std::min(i + 1, logits.size() - 1)]);
      if (weights[0] >= least) race.enter(static_cast<int32_t>(i), weights[0]);
      if (weights[1] >= least && i + 1 < logits.size()) race.enter(static_cast<int32_t>(i + 1), weights[1]);
    }
  } else {
    for (const Candidate& candidate : filter(logits, weight)) race.enter(candidate.id, weight(candidate.logit));
  }
  return race.winner();
}

// The part of the text that penalties see; checks the arguments and makes room.
Result<std::span<const int32_t>> Sampler::window(std::span<const float> logits, std::span<const int32_t> history) {
  EDGE_TRY(status_);
  std::span<const int32_t> window;
  if (config_.has_penalties()) {
    const size_t last_n = static_cast<size_t>(config_.penalty_last_n);
    window = config_.penalty_last_n < 0 || last_n >= history.size() ? history : history.last(last_n);
  }
  EDGE_TRY(check(logits, window));
  EDGE_TRY(reserve());
  return window;
}

// Fills in the most likely tokens; returns the logarithm of the sum that log-probabilities are taken against.
Result<double> Sampler::describe(std::span<const float> logits, float max, uint64_t position, SampledToken& token) {
  EDGE_TRY(check_max(max, position));
  // A sum over the whole vocabulary, in one thread: a tenth of a small model's pass.
  if (config_.n_logprobs < 0) return std::numeric_limits<double>::quiet_NaN();
  const double log_total = static_cast<double>(max) + portable_log(exp_sum(logits, max, 1.0));
  if (config_.n_logprobs > 0) {
    Candidate* room = candidates_.as<Candidate>();
    const size_t n = keep_top_k(logits, config_.n_logprobs, room);
    for (size_t i = 0; i < n; ++i) {
      token.top.emplace_back(room[i].id, static_cast<double>(room[i].logit) - log_total);
    }
  }
  return log_total;
}

Result<SampledToken> Sampler::report(std::span<const float> logits, int32_t token, uint64_t position) {
  EDGE_ASSIGN([[maybe_unused]] const auto unseen, window(logits, {}));
  SampledToken result;
  EDGE_ASSIGN(const double log_total, describe(logits, peak_logit(logits).logit, position, result));
  result.token = token;
  result.logprob = static_cast<double>(logits[static_cast<size_t>(token)]) - log_total;
  return result;
}

Result<SampledToken> Sampler::sample(std::span<float> logits, std::span<const int32_t> history, uint64_t position) {
  EDGE_ASSIGN(const auto seen, window(logits, history));
  SampledToken result;
  Peak peak = peak_logit(logits);
  EDGE_ASSIGN(const double log_total, describe(logits, peak.logit, position, result));
  adjust(logits, seen);
  if (!seen.empty() || !config_.logit_bias.empty()) peak = peak_logit(logits);
  const Status usable = check_max(peak.logit, position);
  if (usable.ok()) result.token = config_.temperature > 0 ? draw(logits, peak.logit, position) : peak.token;
  restore(logits, seen);
  EDGE_TRY(usable);
  result.logprob = static_cast<double>(logits[static_cast<size_t>(result.token)]) - log_total;
  return result;
}

Result<std::span<TokenProbability>> Sampler::distribution(std::span<float> logits, std::span<const int32_t> history,
                                                          uint64_t position) {
  EDGE_ASSIGN(const auto seen, window(logits, history));
  if (probabilities_.data() == nullptr) {
    EDGE_ASSIGN(probabilities_,
                budget_->reserve(static_cast<uint64_t>(vocab_size_) * sizeof(TokenProbability), "sampler"));
  }
  TokenProbability* out = probabilities_.as<TokenProbability>();
  size_t n = 0;
  adjust(logits, seen);
  const Peak peak = peak_logit(logits);
  const Status usable = check_max(peak.logit, position);
  if (usable.ok() && config_.temperature == 0) {
    out[n++] = {peak.token, 1};
  } else if (usable.ok()) {
    const Weighting weight(peak.logit, config_.temperature);
    if (filters()) {
      for (const Candidate& kept : filter(logits, weight)) out[n++] = {kept.id, weight(kept.logit)};
      std::sort(out, out + n, [](const auto& a, const auto& b) { return a.token < b.token; });
    } else {
      for (size_t id = 0; id < logits.size(); ++id) {
        const double w = weight(logits[id]);
        if (w > 0 && w >= static_cast<double>(config_.min_p)) out[n++] = {static_cast<int32_t>(id), w};
      }
    }
    double total = 0;
    for (size_t i = 0; i < n; ++i) total += out[i].probability;
    for (size_t i = 0; i < n; ++i) out[i].probability /= total;
  }
  restore(logits, seen);
  EDGE_TRY(usable);
  return std::span<TokenProbability>(out, n);
}

}  // namespace edge
