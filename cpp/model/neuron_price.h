// What reading a neuron is worth, by the score that a predictor gave it: the energy (act(gate) * up)^2 that neurons of that
// score turned out to have. Down columns of a layer are taken to be equally long. From that follows a price: the score up to
// which those that have no place in memory may be passed over, so that a stated share of a layer's energy is kept. It is
// never so high that fewer are read than cost no time: what a drive brings while a layer is computed need not be left out.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

class NeuronPrice {
 public:
  // Scores above zero, four bins an octave from 2^-10 to 2^6; what lies beyond goes to the first and the last.
  static constexpr size_t kBins = 64;
  static uint8_t bin_of(float score) {
    const int bin = static_cast<int>(std::bit_cast<uint32_t>(score) >> kShift) - kFirstBin;
    return static_cast<uint8_t>(std::clamp(bin, 0, static_cast<int>(kBins) - 1));
  }

  // keep: share of the energy, above 0; 1: everything is read. n_free: so many of a layer's missing neurons, those with the
  // highest scores, are read in any case. What was learnt stays.
  void set_keep(float keep, int64_t n_free, int64_t n_layers) {
    keep_ = keep;
    n_free_ = n_free;
    if (keep < 1) layers_.resize(static_cast<size_t>(n_layers));
  }
  bool is_free() const { return !(keep_ < 1); }

  // A neuron of that bin was computed, and this is what became of it.
  void saw(int64_t layer, uint8_t bin, float value);

  // The highest score that a neuron may have and be passed over, where `n_predicted` have a score of each bin and
  // `n_missing` of these no place in memory; 0 while nothing is known. Of a bin that was seen too rarely the next one's
  // energy is taken, which is more.
  using Counts = std::array<uint32_t, kBins>;
  float price(int64_t layer, const Counts& n_predicted, const Counts& n_missing) const;

 private:
  // A float's exponent and two bits of its mantissa number the bins.
  static constexpr int kShift = 21, kFirstBin = (127 - 10) << 2;
  static float lower_edge(size_t bin) {
    return std::bit_cast<float>(static_cast<uint32_t>(kFirstBin + static_cast<int>(bin)) << kShift);
  }
  // The score that a share of a bin's neurons are below, which lie evenly in it.
  static float inside(size_t bin, double share);
  // The score that about n_free_ of the missing are above.
  float free_price(const Counts& n_missing) const;
  struct Seen {
    float n = 0;
    float energy = 0;
  };
  float keep_ = 1;
  int64_t n_free_ = 0;
  std::vector<std::array<Seen, kBins>> layers_;
};

}  // namespace edge
