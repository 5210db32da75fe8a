#include "sample/log_prob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "sample/portable_math.h"

namespace edge {

namespace {

// Four chains of four lanes: what x86-64 and aarch64 always have.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
constexpr size_t kChains = 4, kStep = 4 * kChains;

Float4 load4(const float* from) {
  Float4 four;
  std::memcpy(&four, from, sizeof four);
  return four;
}

}  // namespace

Peak peak_logit(std::span<const float> logits) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  // Only the block that raised the maximum last is looked through for the token.
  constexpr size_t kBlock = 32 * kStep;
  Peak peak{-kInf, -1};
  size_t raised_in = 0;
  Int4 good = ~Int4{};
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t end = std::min(begin + kBlock, logits.size());
    const size_t whole = begin + (end - begin) / kStep * kStep;
    Float4 chains[kChains];
    for (Float4& chain : chains) chain = Float4{} - kInf;
    for (size_t i = begin; i < whole; i += kStep) {
      for (size_t j = 0; j < kChains; ++j) {
        const Float4 four = load4(logits.data() + i + 4 * j);
        good &= four < kInf;
        chains[j] = four > chains[j] ? four : chains[j];
      }
    }
    chains[0] = chains[0] > chains[1] ? chains[0] : chains[1];
    chains[2] = chains[2] > chains[3] ? chains[2] : chains[3];
    chains[0] = chains[0] > chains[2] ? chains[0] : chains[2];
    float highest = std::max(std::max(chains[0][0], chains[0][1]), std::max(chains[0][2], chains[0][3]));
    for (size_t i = whole; i < end; ++i) {
      if (!(logits[i] < kInf)) good = Int4{};
      highest = std::max(highest, logits[i]);
    }
    if (highest > peak.logit) {
      peak.logit = highest;
      raised_in = begin;
    }
  }
  if ((good[0] & good[1] & good[2] & good[3]) == 0) return {std::numeric_limits<float>::quiet_NaN(), -1};
  if (peak.logit == -kInf) return peak;
  const auto first = std::find(logits.begin() + static_cast<ptrdiff_t>(raised_in), logits.end(), peak.logit);
  peak.token = static_cast<int32_t>(first - logits.begin());
  return peak;
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

double rough_share(std::span<const float> logits, int32_t token) {
  // Schraudolph 1999: the bits of a float, read as an integer, are nearly a line in its logarithm.
  constexpr float kSlope = 12102203.16f, kIntercept = 1064866805.0f;
  const Float4 least = Float4{}, most = Float4{} + 2130706432.0f;  // 0 and 2^127, as bits
  const Float4 own = Float4{} + logits[static_cast<size_t>(token)];
  const auto rough_exp = [&](Float4 x) {
    Float4 bits = (x - own) * kSlope + kIntercept;
    bits = bits > least ? bits : least;
    bits = bits < most ? bits : most;
    return reinterpret_cast<Float4>(__builtin_convertvector(bits, Int4));
  };
  Float4 chains[kChains] = {};
  const size_t whole = logits.size() / kStep * kStep;
  for (size_t i = 0; i < whole; i += kStep) {
    for (size_t j = 0; j < kChains; ++j) chains[j] += rough_exp(load4(logits.data() + i + 4 * j));
  }
  for (size_t i = whole; i < logits.size(); ++i) chains[0][0] += rough_exp(Float4{} + logits[i])[0];
  double sum = 1.0 - static_cast<double>(rough_exp(own)[0]);  // its own weight is known
  for (size_t lane = 0; lane < kStep; ++lane) sum += static_cast<double>(chains[lane / 4][lane % 4]);
  return 1.0 / sum;
}

double log_sum_exp(std::span<const float> logits) {
  const float max = peak_logit(logits).logit;
  if (!std::isfinite(max)) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(max) + portable_log(exp_sum(logits, max, 1.0));
}

double log_prob(std::span<const float> logits, int32_t id) {
  if (id < 0 || static_cast<size_t>(id) >= logits.size()) return std::numeric_limits<double>::quiet_NaN();
  return static_cast<double>(logits[static_cast<size_t>(id)]) - log_sum_exp(logits);
}

}  // namespace edge
