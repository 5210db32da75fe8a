#include "store/neuron_policy.h"

#include <cmath>

namespace edge {

float NeuronPolicy::used(float key, int64_t token) const {
  if (fade_per_token_ == 0.0f) return static_cast<float>(token);
  // One use now weighs 2^now; what was there weighs 2^key. Past a difference of 40 the smaller one is lost in a float.
  const float now = static_cast<float>(token) * fade_per_token_;
  const float before = key - now;
  return before < -40.0f ? now : now + std::log2(1.0f + std::exp2(before));
}

}  // namespace edge
