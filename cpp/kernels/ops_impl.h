// The float operators: one definition, compiled once per ISA with the same bits everywhere.
// Sums run in 16 lane partials in index order, folded by sum_lanes; a tail counts as lanes of zeros. Nothing is fused.
#pragma once

#include "kernels/ops_math.h"
#include "kernels/ops_table.h"

namespace edge::ops {

template <class Isa>
struct Ops {
  using V = V16<Isa>;

  // out[i] = fn(in[i], in2[i]...) over whole blocks of 16 and a tail; `out` may be any of the inputs.
  template <class Fn, class... In>
  static void map(int64_t n, float* out, Fn fn, const In*... in) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, fn(load<Isa>(in + i)...));
    if (i < n) store_tail(out + i, n - i, fn(load_tail<Isa>(in + i, n - i)...));
  }

  // Sum over i of fn(x[i]), with fn(0) for the lanes past the end unless `fill` says otherwise.
  template <class Fn>
  static float sum(const float* x, int64_t n, float fill, Fn fn) {
    V total = splat16<Isa>(0);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total = total + fn(load<Isa>(x + i));
    if (i < n) total = total + fn(load_tail<Isa>(x + i, n - i, fill));
    return sum_lanes(total);
  }

  // (x * (1 / sqrt(mean(x^2) + eps))) * weight, in the order transformers' LlamaRMSNorm multiplies.
  static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    const float squares = sum(x, n, 0, [](const V& v) { return v * v; });
    const V inverse = splat16<Isa>(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps));
    map(n, out, [&](const V& v, const V& w) { return v * inverse * w; }, x, weight);
  }

  static void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out) {
    const float count = static_cast<float>(n);
    const float mean = sum(x, n, 0, [](const V& v) { return v; }) / count;
    const V centre = splat16<Isa>(mean);
    // The lanes past the end hold the mean, so their deviation is zero.
    const float squares = sum(x, n, mean, [&](const V& v) { return (v - centre) * (v - centre); });
    const V inverse = splat16<Isa>(1.0f / __builtin_sqrtf(squares / count + eps));
    if (bias == nullptr) {
      map(n, out, [&](const V& v, const V& w) { return (v - centre) * inverse * w; }, x, weight);
    } else {
      map(n, out, [&](const V& v, const V& w, const V& b) { return (v - centre) * inverse * w + b; }, x, weight, bias);
    }
  }

  static void rope(float* x, const float* cos, const float* sin, int64_t n_rotary) {
    const int64_t half = n_rotary / 2;
    float* y = x + half;
    const auto turn = [](V& a, V& b, const V& c, const V& s) {
      const V turned = a * c - b * s;
      b = b * c + a * s;
      a = turned;
    };
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
      V a = load<Isa>(x + i), b = load<Isa>(y + i);
      turn(a, b, load<Isa>(cos + i), load<Isa>(sin + i));
      store(x + i, a);
      store(y + i, b);
    }
    if (i < half) {
      const int64_t n = half - i;
      V a = load_tail<Isa>(x + i, n), b = load_tail<Isa>(y + i, n);
      turn(a, b, load_tail<Isa>(cos + i, n), load_tail<Isa>(sin + i, n));
      store_tail(x + i, n, a);
      store_tail(y + i, n, b);
    }
  }

  template <class Fn>
  static void activate(const float* gate, const float* up, int64_t n, float* out, Fn fn) {
    if (up == nullptr) {
      map(n, out, fn, gate);
    } else {
      map(n, out, [&](const V& g, const V& u) { return fn(g) * u; }, gate, up);
    }
  }
  static void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
    activate(gate, up, n, out, [](const V& v) { return silu<Isa>(v); });
  }
  static void relu_mul(const float* gate, const float* up, int64_t n, float* out) {
    activate(gate, up, n, out, [](const V& v) { return relu<Isa>(v); });
  }
  static void gelu_mul(const float* gate, const float* up, int64_t n, float* out) {
    activate(gate, up, n, out, [](const V& v) { return gelu<Isa>(v); });
  }
  static void gelu_tanh_mul(const float* gate, const float* up, int64_t n, float* out) {
    activate(gate, up, n, out, [](const V& v) { return gelu_tanh<Isa>(v); });
  }

  static void add(const float* x, int64_t n, float* into) {
    map(n, into, [](const V& a, const V& b) { return a + b; }, into, x);
  }
  static void scale_add(const float* x, float scale, int64_t n, float* into) {
    const V factor = splat16<Isa>(scale);
    map(n, into, [&](const V& a, const V& b) { return a + factor * b; }, into, x);
  }

  static uint32_t beyond16(const V& x, const V& limit) {
    uint32_t bits = 0;
    for (int i = 0; i < V::kParts; ++i) {
      const typename Isa::Vec size = x.part[i] < 0 ? -x.part[i] : x.part[i];
      bits |= Isa::bits(~(size <= limit.part[i])) << i * Isa::kLanes;
    }
    return bits;
  }
  static void beyond(const float* x, const float* limit, int64_t n, uint64_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t left = n - i;
      const V values = left < 16 ? load_tail<Isa>(x + i, left) : load<Isa>(x + i);
      V limits = splat16<Isa>(0);
      if (limit != nullptr) limits = left < 16 ? load_tail<Isa>(limit + i, left) : load<Isa>(limit + i);
      const uint64_t bits = beyond16(values, limits);
      out[i / 64] = i % 64 == 0 ? bits : out[i / 64] | bits << i % 64;
    }
  }

  static V round16(const V& v) {
    V rounded;
    for (int i = 0; i < V::kParts; ++i) {
      uint16_t halves[Isa::kLanes];
      Isa::to_f16(v.part[i], halves);
      rounded.part[i] = Isa::from_f16(halves);
    }
    return rounded;
  }

  // x[i] = finish(e^x[i] / sum of all of them), the largest taken away from exponents first.
  template <class Fn>
  static void softmax(float* x, int64_t n, Fn finish) {
    constexpr float kNone = -__builtin_inff();
    V largest = splat16<Isa>(kNone);
    const auto raise = [&](const V& v) {
      for (int i = 0; i < V::kParts; ++i) {
        largest.part[i] = largest.part[i] < v.part[i] ? v.part[i] : largest.part[i];
      }
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) raise(load<Isa>(x + i));
    if (i < n) raise(load_tail<Isa>(x + i, n - i, kNone));
    const V top = splat16<Isa>(max_lanes(largest));
    V sums = splat16<Isa>(0);
    for (i = 0; i + 16 <= n; i += 16) {
      const V e = exp<Isa>(load<Isa>(x + i) - top);
      store(x + i, e);
      sums = sums + e;
    }
    if (i < n) {
      store_tail(x + i, n - i, exp<Isa>(load_tail<Isa>(x + i, n - i) - top));
      sums = sums + load_tail<Isa>(x + i, n - i);
    }
    const V total = splat16<Isa>(sum_lanes(sums));
    map(n, x, [&](const V& v) { return finish(v / total); }, x);
  }
  static void softmax(float* x, int64_t n) {
    softmax(x, n, [](const V& v) { return v; });
  }
  static void softmax_f16(float* x, int64_t n) { softmax(x, n, round16); }

  // out = x at f16 precision; in place allowed.
  static void round_f16(const float* x, int64_t n, float* out) { map(n, out, round16, x); }

  static void to_f16(const float* x, int64_t n, uint16_t* out) {
    const auto convert = [](const V& v, uint16_t* halves) {
      for (int i = 0; i < V::kParts; ++i) Isa::to_f16(v.part[i], halves + i * Isa::kLanes);
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) convert(load<Isa>(x + i), out + i);
    if (i < n) {
      uint16_t halves[16];
      convert(load_tail<Isa>(x + i, n - i), halves);
      for (int64_t j = 0; i + j < n; ++j) out[i + j] = halves[j];
    }
  }
};

}  // namespace edge::ops

#include "kernels/ops_attention.h"  // uses Ops::softmax

namespace edge::ops {

template <class Isa>
constexpr OpsTable make_table() {
  using O = Ops<Isa>;
  using A = Attention<Isa>;
  return {O::rms_norm, O::layer_norm,    O::rope, O::silu_mul,  O::relu_mul, O::gelu_mul,
          O::gelu_tanh_mul, O::add, O::scale_add, O::beyond, O::softmax, A::begin, A::scores, A::weigh, A::values,
          O::to_f16};
}

}  // namespace edge::ops
