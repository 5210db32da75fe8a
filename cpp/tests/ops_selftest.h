// Float operators and f16 attention of one ISA against ref: what kernel_selftest runs beside the matrix products.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "tests/neuron_selftest.h"

namespace edge {

// Attention over keys and values that lie scattered, as pages do.
template <typename Random, typename RandomHalf, typename RandomFloats>
std::vector<float> attend_rows(const Kernels& kernels, Random random, RandomHalf random_half,
                               RandomFloats random_floats) {
  const int64_t head_dim = 1 + random.below(140), group = 1 + random.below(9), n = 1 + random.below(90);
  std::vector<uint16_t> rows(static_cast<size_t>(2 * n * head_dim));
  for (uint16_t& half : rows) {
    half = random.below(8) == 0 ? random_half(random) : static_cast<uint16_t>(random.below(0x3c00));
  }
  std::vector<const uint16_t*> k, v;
  for (int64_t i = 0; i < n; ++i) {
    k.push_back(rows.data() + 2 * i * head_dim);
    v.push_back(rows.data() + (2 * i + 1) * head_dim);
  }
  const std::vector<float> q = random_floats(random, group * head_dim);
  std::vector<float> scores(static_cast<size_t>(group * n)), out(static_cast<size_t>(group * head_dim));
  AttentionArgs args = {q.data(), group, head_dim, k.data(), v.data(), n, 0.1f, scores.data(), out.data(), n};
  args.n = n;
  kernels.attention_begin(args);
  kernels.attention_scores(args);
  kernels.attention_weigh(args);
  kernels.attention_values(args);
  return out;
}

// One random case; the number of operators that differ. Both runs get the same numbers: `random` goes by value.
template <typename Random, typename RandomHalf, typename RandomFloats>
int compare_ops(const Kernels& ref, const Kernels& isa, Random& random, RandomHalf random_half,
                RandomFloats random_floats) {
  const int64_t n = 1 + random.below(300);
  const std::vector<float> x = random_floats(random, n), y = random_floats(random, n), z = random_floats(random, n);
  const float* up = random.below(3) == 0 ? nullptr : y.data();
  const float scale = random.symmetric();
  int failures = 0;
  const auto check = [&](const char* op, const auto& run) {
    std::vector<float> expected = z, found = z;
    run(ref, expected.data());
    run(isa, found.data());
    failures += same_outputs(isa.isa, op, "f32", expected, found) ? 0 : 1;
  };
  check("rms_norm", [&](const Kernels& k, float* out) { k.rms_norm(x.data(), y.data(), 1e-5f, n, out); });
  check("layer_norm", [&](const Kernels& k, float* out) { k.layer_norm(x.data(), y.data(), up, 1e-5f, n, out); });
  check("rope", [&](const Kernels& k, float* out) { k.rope(out, x.data(), y.data(), n / 2 * 2); });
  check("silu_mul", [&](const Kernels& k, float* out) { k.silu_mul(x.data(), up, n, out); });
  check("relu_mul", [&](const Kernels& k, float* out) { k.relu_mul(x.data(), up, n, out); });
  check("gelu_mul", [&](const Kernels& k, float* out) { k.gelu_mul(x.data(), up, n, out); });
  check("gelu_tanh_mul", [&](const Kernels& k, float* out) { k.gelu_tanh_mul(x.data(), up, n, out); });
  check("add", [&](const Kernels& k, float* out) { k.add(x.data(), n, out); });
  check("scale_add", [&](const Kernels& k, float* out) { k.scale_add(x.data(), scale, n, out); });
  check("beyond", [&](const Kernels& k, float* out) {
    std::vector<uint64_t> words(static_cast<size_t>(n + 63) / 64);
    k.beyond(x.data(), up, n, words.data());
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(words[static_cast<size_t>(i / 64)] >> i % 64 & 1);
  });
  check("softmax", [&](const Kernels& k, float* out) { k.softmax(out, n); });
  check("to_f16", [&](const Kernels& k, float* out) { k.to_f16(x.data(), n, reinterpret_cast<uint16_t*>(out)); });
  const std::vector<float> expected = attend_rows(ref, random, random_half, random_floats);
  const std::vector<float> found = attend_rows(isa, random, random_half, random_floats);
  failures += same_outputs(isa.isa, "attention", "f16", expected, found) ? 0 : 1;
  random.next();
  return failures;
}

}  // namespace edge
