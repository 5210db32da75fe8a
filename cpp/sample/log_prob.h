// Log-probabilities from logits, in double and in one fixed order.
#pragma once

#include <cstdint>
#include <span>

namespace edge {

// The largest logit and the first token that has it.
struct Peak {
  float logit;    // NaN when any logit is NaN or +inf, -inf when all are -inf (a masked token)
  int32_t token;  // -1 in both cases
};
Peak peak_logit(std::span<const float> logits);

// Sum over i of e^((logits[i] - max) / temperature), for max >= every logit: eight partial sums over i mod 8, then
// those in pairs.
double exp_sum(std::span<const float> logits, float max, double temperature);

// softmax(logits)[token] within 4 %, in a tenth of the time: for guesses, on which no text depends. The logits are as
// peak_logit() wants them, and the token's is above -inf.
double rough_share(std::span<const float> logits, int32_t token);

// ln(sum of e^logits). NaN when a logit is NaN or +inf, or all are -inf.
double log_sum_exp(std::span<const float> logits);

// Natural log of softmax(logits)[id]; NaN for an id outside the logits and where log_sum_exp is.
double log_prob(std::span<const float> logits, int32_t id);

}  // namespace edge
