#include "sample/log_prob.h"

#include <cmath>
#include <limits>

#include "sample/portable_math.h"

namespace edge {

float max_logit(std::span<const float> logits) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  uint32_t bad[kLanes] = {};
  for (float& lane : lanes) lane = -kInf;
  const auto take = [&](size_t lane, float logit) {
    lanes[lane] = lanes[lane] < logit ? logit : lanes[lane];
    bad[lane] |= logit < kInf ? 0u : 1u;
  };
  const size_t whole = logits.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) take(j, logits[i + j]);
  }
  for (size_t i = whole; i < logits.size(); ++i) take(i - whole, logits[i]);
  for (size_t j = 0; j < kLanes; ++j) {
    if (bad[j] != 0) return std::numeric_limits<float>::quiet_NaN();
    lanes[0] = lanes[0] < lanes[j] ? lanes[j] : lanes[0];
  }
  return lanes[0];
}

double exp_sum(std::span<const float> logits, float max, double temperature) {
  constexpr size_t kLanes = 8;
  double lanes[kLanes] = {};
  const auto weight = [&](float logit) {
    return portable_exp((static_cast<double>(logit) - static_cast<double>(max)) / temperature);
  };
  const size_t whole = logits.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] += weight(logits[i + j]);
  }
  for (size_t i = whole; i < logits.size(); ++i) lanes[i - whole] += weight(logits[i]);
  for (size_t j = 1; j < kLanes; ++j) lanes[0] += lanes[j];
  return lanes[0];
}

double log_sum_exp(std::span<const float> logits) {
  const float max = max_logit(logits);
  if (!std::isfinite(max)) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(max) + portable_log(exp_sum(logits, max, 1.0));
}

double log_prob(std::span<const float> logits, int32_t id) {
  if (id < 0 || static_cast<size_t>(id) >= logits.size()) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(logits[static_cast<size_t>(id)]) - log_sum_exp(logits);
}

}  // namespace edge
