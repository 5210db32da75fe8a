// exp and log in double from +, -, *, / alone: a text must not depend on whose libm the machine has.
#pragma once

#include <bit>
#include <cstdint>

namespace edge {

// Two at a time, what x86-64 and aarch64 always have; lanes never mix, so one value gives the same bits alone.
typedef double Double2 __attribute__((vector_size(16)));
typedef uint64_t Uint2 __attribute__((vector_size(16)));

// e^x for x <= 700, relative error about 1e-14; 0 below -700.
inline Double2 portable_exp(Double2 x) {
  const Double2 clamped = x > -700.0 ? x : Double2{} - 700.0;
  // Adding 1.5 * 2^52 rounds to an integer, which then sits in the low bits.
  const Double2 shifted = clamped * 1.4426950408889634 + 0x1.8p52;
  const Double2 n = shifted - 0x1.8p52;
  // ln 2 in two parts; n times the first (32 trailing zero bits) is exact.
  const Double2 r = (clamped - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Double2 power = Double2{} + 1.0 / 39916800;  // Taylor to r^11; |r| <= 0.347
  power = power * r + 1.0 / 3628800;
  power = power * r + 1.0 / 362880;
  power = power * r + 1.0 / 40320;
  power = power * r + 1.0 / 5040;
  power = power * r + 1.0 / 720;
  power = power * r + 1.0 / 120;
  power = power * r + 1.0 / 24;
  power = power * r + 1.0 / 6;
  power = power * r + 0.5;
  power = power * r + 1.0;
  power = power * r + 1.0;
  const Uint2 exponent = (reinterpret_cast<Uint2>(shifted) + 1023) << 52;
  const Double2 result = power * reinterpret_cast<Double2>(exponent);
  return x > -700.0 ? result : Double2{};
}

inline double portable_exp(double x) { return portable_exp(Double2{x, x})[0]; }

// 2 atanh(s) = log((1 + s) / (1 - s)) for |s| <= 0.172, relative error about 1e-16.
inline double twice_atanh(double s) {
  const double square = s * s;
  double sum = 0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return 2.0 * s * sum;
}

// ln x for normal x > 0.
inline double portable_log(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  // The mantissa between sqrt(1/2) and sqrt(2), 2^e for the rest.
  const int64_t e = static_cast<int64_t>(bits - std::bit_cast<uint64_t>(0.70710678118654752)) >> 52;
  const double m = std::bit_cast<double>(bits - (static_cast<uint64_t>(e) << 52));
  const double scale = static_cast<double>(e);
  return scale * 6.93147180369123816490e-01 + (twice_atanh((m - 1.0) / (m + 1.0)) + scale * 1.90821492927058770002e-10);
}

// The exponential variate -log(1 - u); precise for small u, where it decides the draw.
inline double exponential(double u) { return u < 0.25 ? twice_atanh(u / (2.0 - u)) : -portable_log(1.0 - u); }

}  // namespace edge
