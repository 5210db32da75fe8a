// How the next token is drawn from the model's logits.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "core/status.h"

namespace edge {

// The defaults leave the model's distribution as it is.
struct SamplingConfig {
  float temperature = 1.0f;         // 0..100; 0 takes the largest logit, the lowest id on ties
  int64_t top_k = 0;                // >= 0; 0 is off
  float typical_p = 1.0f;           // (0, 1]; 1 is off
  float top_p = 1.0f;               // (0, 1]; 1 is off
  float min_p = 0.0f;               // [0, 1]; 0 is off
  float repetition_penalty = 1.0f;  // 0.01..100; 1 is off
  float presence_penalty = 0.0f;    // -100..100, as the logits
  float frequency_penalty = 0.0f;   // -100..100, as the logits
  int64_t penalty_last_n = -1;      // latest tokens the penalties see; -1: all, 0: none
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, what is added to its logit; -inf bans the token
  uint64_t seed = 0;
  int64_t n_logprobs = 0;           // 0..1024 most likely tokens to report; -1: nor the drawn token's log-probability

  // kBadArgument: the first value out of range, with its name and range. Token ids must lie below vocab_size.
  Status validate(int64_t vocab_size = std::numeric_limits<int32_t>::max()) const;

  bool operator==(const SamplingConfig&) const = default;

  bool has_penalties() const {
    return penalty_last_n != 0 && (repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f);
  }
};

}  // namespace edge
