#include "sample/log_prob.h"

#include <bit>
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
  const double top = static_cast<double>(max), inverse = 1.0 / temperature;
  Double2 lanes[4] = {};
  const auto add = [&](const float* eight) {
    for (int j = 0; j < 4; ++j) {
      const Double2 pair = {static_cast<double>(eight[2 * j]), static_cast<double>(eight[2 * j + 1])};
      lanes[j] += portable_exp((pair - top) * inverse);
    }
  };
  const size_t whole = logits.size() / 8 * 8;
  for (size_t i = 0; i < whole; i += 8) add(logits.data() + i);
  if (whole < logits.size()) {
    float tail[8];
    for (size_t j = 0; j < 8; ++j) {
      tail[j] = whole + j < logits.size() ? logits[whole + j] : -std::numeric_limits<float>::infinity();
    }
    add(tail);
  }
  double sum = 0;
  for (const Double2& pair : lanes) sum += pair[0] + pair[1];
  return sum;
}

double rough_exp_sum(std::span<const float> logits, float max) {
  // Schraudolph 1999: the bits of a float, read as an integer, are nearly a line in its logarithm.
  constexpr float kSlope = 12102203.16f, kIntercept = 1064866805.0f, kLeast = -80.0f;
  constexpr size_t kLanes = 16;
  float lanes[kLanes] = {};
  const auto rough_exp = [](float x) {
    return std::bit_cast<float>(static_cast<int32_t>((x > kLeast ? x : kLeast) * kSlope + kIntercept));
  };
  const size_t whole = logits.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] += rough_exp(logits[i + j] - max);
  }
  for (size_t i = whole; i < logits.size(); ++i) lanes[i - whole] += rough_exp(logits[i] - max);
  double sum = 1.0 - static_cast<double>(rough_exp(0));  // the largest is known
  for (const float lane : lanes) sum += static_cast<double>(lane);
  return sum;
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
