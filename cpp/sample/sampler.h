// Draws the next token. The text is a function of the logits, the config and the position: nothing is carried over.
//
// Order: logit bias; repetition, presence and frequency penalty; temperature; top-k; typical; top-p; min-p. That is
// transformers' order (processors, then temperature, then the filters) with typical before top-p as in llama.cpp.
// Repetition penalty: Keskar et al. 2019, a logit above 0 is divided by it and one below 0 multiplied. Presence and
// frequency: subtracted once per token seen, and once per occurrence.
//
// The draw is Gumbel-max: the token with the largest ln p + g, g = gumbel(seed, position, id). Tokens keep their g
// whatever the distribution, so two distributions that are close mostly draw the same token.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/budget.h"
#include "core/status.h"
#include "sample/filters.h"
#include "sample/log_prob.h"
#include "sample/sampling_config.h"

namespace edge {

struct SampledToken {
  int32_t token = -1;
  double logprob = 0;                           // of the model's own distribution, before bias, penalties and filters; NaN unless asked for
  std::vector<std::pair<int32_t, double>> top;  // the n_logprobs most likely tokens of that distribution
};

struct TokenProbability {
  int32_t token;
  double probability;
};

// Standard Gumbel variate of one token at one position.
double gumbel(uint64_t seed, uint64_t position, int32_t id);

class Sampler {
 public:
  // A config that does not validate is reported by every sample(). Scratch is kept between calls and comes from
  // `budget` (tag "sampler"), which must outlive the sampler; without one it is not counted.
  Sampler(SamplingConfig config, int64_t vocab_size, Budget* budget = nullptr);

  // logits [vocab_size] are worked on in place and left as they were. history: the text so far, for the penalties.
  // position: index of the new token.
  // -inf masks a token; kCorrupt when a logit is NaN or +inf or no token is left, kBadArgument for a wrong size or id.
  Result<SampledToken> sample(std::span<float> logits, std::span<const int32_t> history, uint64_t position);

  // The distribution that sample() draws from, normalised, by ascending token; tokens of probability 0 are left out.
  // In memory of the sampler's: the caller may change it, until the next call.
  Result<std::span<TokenProbability>> distribution(std::span<float> logits, std::span<const int32_t> history,
                                                   uint64_t position);
  // What sample() reports besides the token, for a token drawn by another rule.
  Result<SampledToken> report(std::span<const float> logits, int32_t token, uint64_t position);

  const SamplingConfig& config() const { return config_; }

 private:
  // What bias and penalties did to one token.
  struct Change {
    float logit;    // before
    int32_t count;  // of the token in the window; zero between calls
  };

  Status reserve();
  Status check(std::span<const float> logits, std::span<const int32_t> window) const;
  void adjust(std::span<float> logits, std::span<const int32_t> window);
  void restore(std::span<float> logits, std::span<const int32_t> window) const;
  std::span<Candidate> filter(std::span<const float> logits, const Weighting& weight);
  int32_t draw(std::span<const float> logits, float max, uint64_t position);
  bool filters() const { return config_.top_k > 0 || config_.typical_p < 1 || config_.top_p < 1; }
  Result<double> describe(std::span<const float> logits, float max, uint64_t position, SampledToken& token);
  Result<std::span<const int32_t>> window(std::span<const float> logits, std::span<const int32_t> history);

  SamplingConfig config_;
  int64_t vocab_size_;
  Status status_;
  std::unique_ptr<Budget> own_budget_;
  Budget* budget_;
  Block candidates_;  // Candidate[]
  Block changes_;     // Change[vocab_size]
  Block probabilities_;  // TokenProbability[vocab_size], for distribution()
};

}  // namespace edge
