#include "model/neuron_price.h"

#include <algorithm>
#include <limits>

namespace edge {
namespace {

// A bin's mean is taken from so many neurons at least; of more than the most, older ones count less and less.
constexpr float kEnough = 16, kMost = 1 << 16;

}  // namespace

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
    if (lost > left) return std::min(inside(i, left / lost), free_price(n_missing));
    left -= lost;
  }
  return std::min(n_known > 0 ? lower_edge(n_known) : 0.0f, free_price(n_missing));
}

float NeuronPrice::free_price(const Counts& n_missing) const {
  int64_t left = n_free_;
  for (size_t i = kBins; i-- > 0;) {
    const int64_t n = n_missing[i];
    if (n > left) return inside(i, 1 - static_cast<double>(left) / static_cast<double>(n));
    left -= n;
  }
  return 0.0f;
}

float NeuronPrice::inside(size_t bin, double share) {
  const float edge = lower_edge(bin);
  return edge + static_cast<float>(share) * (lower_edge(bin + 1) - edge);
}

}  // namespace edge
