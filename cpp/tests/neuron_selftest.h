// Neuron kernels of one ISA against ref: what kernel_selftest runs beside the matrix products.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"

namespace edge {

// Rows as random as `random` makes them: every quant, ordinary, zero, subnormal and large scales.
template <typename Random, typename RandomHalf>
std::vector<std::byte> random_neuron_rows(Random& random, RandomHalf random_half, WeightFormat format, int64_t n,
                                          int64_t hidden) {
  const int64_t group_bytes = kNeuronTraits[neuron_index(format)].group_bytes;
  std::vector<std::byte> rows(static_cast<size_t>(n * neuron_row_bytes(format, hidden)));
  for (std::byte& byte : rows) byte = static_cast<std::byte>(random.next());
  const int64_t n_halves = format == WeightFormat::kNeuronF16 ? kNeuronGroupValues : 8;
  for (size_t at = 0; at < rows.size(); at += static_cast<size_t>(group_bytes)) {
    for (int64_t i = 0; i < n_halves; ++i) {
      const uint16_t half = random_half(random);
      std::memcpy(rows.data() + at + 2 * i, &half, 2);
    }
  }
  return rows;
}

inline bool same_outputs(const char* isa, const char* op, const char* format, const std::vector<float>& expected,
                         const std::vector<float>& found) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&expected[i], &found[i], 4) == 0 || (expected[i] != expected[i] && found[i] != found[i])) continue;
    std::printf("%s: %s %s: out[%zu] is %a, ref has %a\n", isa, op, format, i, static_cast<double>(found[i]),
                static_cast<double>(expected[i]));
    return false;
  }
  return true;
}

// One random case; the number of kernels that differ.
template <typename Random, typename RandomHalf, typename RandomFloats>
int compare_neurons(const Kernels& ref, const Kernels& isa, WeightFormat format, Random& random,
                    RandomHalf random_half, RandomFloats random_floats) {
  const int f = neuron_index(format);
  const char* name = kNeuronTraits[f].name;
  const int64_t hidden = 1 + random.below(700), n = 1 + random.below(12), n_x = 1 + random.below(9);
  const int64_t stride = neuron_act_bytes(format, hidden), row_bytes = neuron_row_bytes(format, hidden);
  const std::vector<std::byte> rows = random_neuron_rows(random, random_half, format, n, hidden);
  std::vector<const std::byte*> at;
  for (int64_t i = 0; i < n; ++i) at.push_back(rows.data() + i * row_bytes);
  const std::vector<float> x = random_floats(random, n_x * hidden);
  std::vector<std::byte> acts(static_cast<size_t>(n_x * stride)), isa_acts = acts;
  for (int64_t m = 0; m < n_x; ++m) {
    ref.neuron.act[f](x.data() + m * hidden, hidden, acts.data() + m * stride);
    isa.neuron.act[f](x.data() + m * hidden, hidden, isa_acts.data() + m * stride);
  }
  int failures = 0;
  if (std::memcmp(acts.data(), isa_acts.data(), acts.size()) != 0) {
    std::printf("%s: activations for %s differ from ref (hidden=%lld)\n", isa.isa, name, static_cast<long long>(hidden));
    ++failures;
  }
  const int64_t out_stride = n + random.below(3);
  std::vector<float> expected(static_cast<size_t>(n_x * out_stride), 7.0f), found = expected;
  ref.neuron.dot[f](at.data(), n, hidden, acts.data(), stride, n_x, expected.data(), out_stride);
  isa.neuron.dot[f](at.data(), n, hidden, acts.data(), stride, n_x, found.data(), out_stride);
  failures += same_outputs(isa.isa, "dot", name, expected, found) ? 0 : 1;

  std::vector<float> a = random_floats(random, n);
  for (float& value : a) value = random.below(3) == 0 ? 0.0f : value;
  const int64_t n_pieces = (hidden + 31) / 32, begin = random.below(n_pieces + 1);
  const int64_t end = begin + random.below(n_pieces - begin + 1);
  expected.assign(static_cast<size_t>(32 * n_pieces), 0.5f);
  found = expected;
  ref.neuron.axpy[f](at.data(), a.data(), n, 32 * begin, 32 * end, expected.data());
  isa.neuron.axpy[f](at.data(), a.data(), n, 32 * begin, 32 * end, found.data());
  failures += same_outputs(isa.isa, "axpy", name, expected, found) ? 0 : 1;
  return failures;
}

}  // namespace edge
