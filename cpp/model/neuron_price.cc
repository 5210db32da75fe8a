#include "model/neuron_price.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace edge {
namespace {

constexpr int kLeastExponent = -10, kBiasOfExponent = 127;
constexpr int kMantissaBits = 23, kBitsOfBin = 2;  // of the mantissa
// A bin's mean is taken from so many neurons at least; of more than the most, older ones count less and less.
constexpr float kEnough = 16, kMost = 1 << 16;

float lower_edge(size_t bin) {
  const uint32_t first = (kLeastExponent + kBiasOfExponent) << kBitsOfBin;
  return std::bit_cast<float>((first + static_cast<uint32_t>(bin)) << (kMantissaBits - kBitsOfBin));
}

}  // namespace

uint8_t NeuronPrice::bin_of(float score) {
  constexpr int64_t kFirst = (kLeastExponent + kBiasOfExponent) << kBitsOfBin;
  const int64_t bin = static_cast<int64_t>(std::bit_cast<uint32_t>(score) >> (kMantissaBits - kBitsOfBin)) - kFirst;
  return static_cast<uint8_t>(std::clamp<int64_t>(bin, 0, kBins - 1));
}

void NeuronPrice::saw(int64_t layer, uint8_t bin, float value) {
  const float energy = value * value;
  // What is not a number says nothing about others.
  if (!(energy <= std::numeric_limits<float>::max())) return;
  Seen& seen = layers_[static_cast<size_t>(layer)][bin];
  if (seen.n >= kMost) {
    seen.n /= 2;
    seen.energy /= 2;
  }
  seen.n += 1;
  seen.energy += energy;
}

float NeuronPrice::price(int64_t layer, const Counts& n_predicted, const Counts& n_missing) const {
  const std::array<Seen, kBins>& seen = layers_[static_cast<size_t>(layer)];
  std::array<double, kBins> mean{};
  double above = -1, total = 0;  // of the bin after; -1: unknown
  size_t n_known = 0;            // bins before the first of which nothing is known
  for (size_t i = kBins; i-- > 0;) {
    if (seen[i].n >= kEnough) above = static_cast<double>(seen[i].energy) / static_cast<double>(seen[i].n);
    if (above < 0) continue;
    n_known = std::max(n_known, i + 1);
    mean[i] = above;
    total += above * n_predicted[i];
  }
  double left = (1 - static_cast<double>(keep_)) * total;
  for (size_t i = 0; i < n_known; ++i) {
    const double lost = mean[i] * n_missing[i];
    if (lost > left) {
      // Scores lie evenly in a bin.
      const float edge = lower_edge(i);
      return edge + static_cast<float>(left / lost) * (lower_edge(i + 1) - edge);
    }
    left -= lost;
  }
  return n_known > 0 ? lower_edge(n_known) : 0.0f;
}

}  // namespace edge
