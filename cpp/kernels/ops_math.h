// exp, the logistic function and the normal distribution's tail on 16 floats: our own, so that every ISA agrees.
// Polynomials are minimax fits (iteratively reweighted least squares) made in double precision.
#pragma once

#include "kernels/ops_vector.h"

namespace edge::ops {

// e^x within about 1 ulp; 0 below -104, inf above 88.73, NaN stays NaN.
template <class Isa>
inline typename Isa::Vec exp_part(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  using IVec = typename Isa::IVec;
  // e^-104 rounds to 0 and e^89 to inf: beyond them nothing changes, and 2^n stays within two exact factors.
  x = x < -104.0f ? splat<Isa>(-104.0f) : x;
  x = x > 89.0f ? splat<Isa>(89.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  constexpr float kRounder = 12582912.0f;
  const Vec shifted = x * 1.44269504f + kRounder;
  const Vec n = shifted - kRounder;
  // ln 2 in two parts; n times the first (9 bits) is exact.
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec q = r * 0.0013813142431899905f + 0.008369418792426586f;
  q = q * r + 0.04166845604777336f;
  q = q * r + 0.16666515171527863f;
  q = q * r + 0.4999999403953552f;
  const Vec power = (r * r * q + r) + 1.0f;
  // 2^n as two factors, so that results below 2^-126 are rounded once and those above 2^127 overflow.
  const IVec exponent = reinterpret_cast<IVec>(shifted) - 0x4b400000;
  const IVec first = exponent >> 1;
  const IVec scale1 = (first + 127) << 23;
  const IVec scale2 = (exponent - first + 127) << 23;
  return power * reinterpret_cast<Vec>(scale1) * reinterpret_cast<Vec>(scale2);
}

template <class Isa>
inline V16<Isa> exp(const V16<Isa>& x) {
  V16<Isa> r;
  for (int i = 0; i < V16<Isa>::kParts; ++i) r.part[i] = exp_part<Isa>(x.part[i]);
  return r;
}

// x / (1 + e^-x)
template <class Isa>
inline V16<Isa> silu(const V16<Isa>& x) {
  return x / (splat16<Isa>(1) + exp<Isa>(splat16<Isa>(0) - x));
}

// max(x, 0); -0 becomes 0, so that a skipped neuron and a computed one agree; NaN stays NaN.
template <class Isa>
inline V16<Isa> relu(const V16<Isa>& x) {
  V16<Isa> r;
  for (int i = 0; i < V16<Isa>::kParts; ++i) r.part[i] = x.part[i] <= 0.0f ? splat<Isa>(0) : x.part[i];
  return r;
}

// 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), written as x / (1 + e^(-2u)): the same function
// without the cancellation of 1 + tanh.
template <class Isa>
inline V16<Isa> gelu_tanh(const V16<Isa>& x) {
  const V16<Isa> cube = splat16<Isa>(0.044715f) * x * x * x;
  return x / (splat16<Isa>(1) + exp<Isa>(splat16<Isa>(-1.5957691216057308f) * (x + cube)));
}

// 0.5 x (1 + erf(x / sqrt 2)). erfc(z) = e^(-z^2) t P(t - 1/2), t = 1 / (1 + 0.4 z), for z in [0, 10]; relative
// error of the fit 8e-9. The tail is taken for negative x, so nothing cancels.
template <class Isa>
inline V16<Isa> gelu(const V16<Isa>& x) {
  constexpr float kFit[10] = {0.4216127395629883f,   0.6437214016914368f,   0.7262625694274902f,  0.5480144023895264f,
                              0.181512251496315f,    -0.10778360068798065f, -0.12305282056331635f, 0.02689233236014843f,
                              0.0648386999964714f,   -0.029594337567687035f};
  V16<Isa> z;
  for (int i = 0; i < V16<Isa>::kParts; ++i) {
    z.part[i] = (x.part[i] < 0.0f ? -x.part[i] : x.part[i]) * 0.70710678f;
  }
  const V16<Isa> t = splat16<Isa>(1) / (splat16<Isa>(1) + splat16<Isa>(0.4f) * z);
  const V16<Isa> s = t - splat16<Isa>(0.5f);
  V16<Isa> fit = splat16<Isa>(kFit[9]);
  for (int i = 8; i >= 0; --i) fit = fit * s + splat16<Isa>(kFit[i]);
  const V16<Isa> half_tail = splat16<Isa>(0.5f) * (exp<Isa>(splat16<Isa>(0) - z * z) * t * fit);
  V16<Isa> phi;
  for (int i = 0; i < V16<Isa>::kParts; ++i) {
    phi.part[i] = x.part[i] < 0.0f ? half_tail.part[i] : 1.0f - half_tail.part[i];
  }
  return x * phi;
}

}  // namespace edge::ops
