// Which neurons of a window are worth their place: a key per neuron, the lowest leaves first.
#pragma once

#include <cstdint>

namespace edge {

// Recency and frequency in one number (LRFU: Lee et al., IEEE Trans. Computers 50(12), 2001). A use counts 1 and fades
// by half every `half_life_tokens`; the key is the logarithm of the sum, seen from token 0, so that keys made at
// different times compare and nothing has to fade neurons that are not used. Half-life 0 is recency alone: the window
// of the last tokens in "LLM in a flash" (arXiv 2312.11514, section 3.2), as long as the slots allow.
class NeuronPolicy {
 public:
  explicit NeuronPolicy(float half_life_tokens)
      : fade_per_token_(half_life_tokens > 0 ? 1.0f / half_life_tokens : 0.0f) {}

  static constexpr float kNeverUsed = -3.0e38f;
  // Measured on the activations of a ReLU language model: `python -m bench window`.
  static constexpr float kHalfLifeTokens = 8.0f;

  // The key of a neuron that had `key` when token number `token` (counted from 0) uses it.
  float used(float key, int64_t token) const;

 private:
  float fade_per_token_;
};

}  // namespace edge
