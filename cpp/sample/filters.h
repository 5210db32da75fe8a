// The filters that cut a distribution down to the tokens worth drawing from. Each keeps at least one token, and keeps a
// set that depends on the logits alone: ties go to the lower id.
#pragma once

#include <cstdint>
#include <span>

#include "sample/portable_math.h"

namespace edge {

struct Candidate {
  float logit;
  int32_t id;
};

inline bool more_likely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Unnormalised probabilities at a temperature: 1 for the largest logit.
struct Weighting {
  Weighting(float max, float temperature)
      : max(max), temperature(static_cast<double>(temperature)), inverse(1.0 / this->temperature) {}
  float max;
  double temperature;
  double inverse;

  double log_weight(float logit) const { return (static_cast<double>(logit) - static_cast<double>(max)) * inverse; }
  double operator()(float logit) const { return portable_exp(log_weight(logit)); }
  Double2 operator()(float a, float b) const { return portable_exp(Double2{log_weight(a), log_weight(b)}); }
};

// Candidates that keep_top_k needs room for.
int64_t top_k_room(int64_t k, int64_t vocab_size);

// The k largest logits above -inf, most likely first, into `room`. Returns how many there are (k or fewer).
size_t keep_top_k(std::span<const float> logits, int64_t k, Candidate* room);

// Locally typical sampling (Meister et al., 2023): tokens by |ln p + entropy| until their mass reaches typical_p.
size_t keep_typical(std::span<Candidate> candidates, const Weighting& weight, double typical_p);

// Nucleus sampling (Holtzman et al., 2020): the most likely tokens until their mass reaches top_p of `total`.
size_t keep_top_p(std::span<Candidate> candidates, const Weighting& weight, double total, double top_p);

// Min-p sampling (Nguyen et al., 2024): tokens at least min_p times as likely as the most likely one left.
size_t keep_min_p(std::span<Candidate> candidates, const Weighting& weight, double min_p);

// Sum of the weights in the order given.
double total_weight(std::span<const Candidate> candidates, const Weighting& weight);

}  // namespace edge
