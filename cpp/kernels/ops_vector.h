// Sixteen floats at a time, whatever the machine's vectors hold: the unit in which every float operator is defined.
// Everything is a template over a type `Isa` from an anonymous namespace, so each ISA's code stays in its own file.
#pragma once

#include <cstdint>
#include <utility>

namespace edge::ops {

// Isa gives: kLanes (4, 8 or 16), Vec and IVec (vectors of kLanes float / int32_t), Vec from_f16(const uint16_t*),
// void to_f16(Vec, uint16_t*), uint32_t bits(IVec) (a bit for each lane that is -1; the others are 0), and the register
// tiles of attention: kScoreHeads, kValueHeads, kValueChunks of 16 dims, kValueSums of the last two's product at most.
template <class Isa>
struct V16 {
  static constexpr int kParts = 16 / Isa::kLanes;
  typename Isa::Vec part[kParts];
};

template <class Isa>
inline typename Isa::Vec splat(float value) {
  return value - typename Isa::Vec{};  // a broadcast alone: taking 0 away changes no value, adding it to -0 would
}

template <class Isa>
inline V16<Isa> splat16(float value) {
  V16<Isa> v;
  for (auto& part : v.part) part = splat<Isa>(value);
  return v;
}

template <class Isa>
inline V16<Isa> load(const float* p) {
  V16<Isa> v;
  for (int i = 0; i < V16<Isa>::kParts; ++i) __builtin_memcpy(&v.part[i], p + i * Isa::kLanes, sizeof v.part[i]);
  return v;
}

template <class Isa>
inline void store(float* p, const V16<Isa>& v) {
  for (int i = 0; i < V16<Isa>::kParts; ++i) __builtin_memcpy(p + i * Isa::kLanes, &v.part[i], sizeof v.part[i]);
}

// The first n < 16 floats; the other lanes hold `fill`. An Isa with one vector for all 16 may have masks for this.
template <class Isa>
inline V16<Isa> load_tail(const float* p, int64_t n, float fill = 0) {
  if constexpr (requires { Isa::load_first(p, n, fill); }) {
    return {{Isa::load_first(p, n, fill)}};
  } else {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = i < n ? p[i] : fill;
    return load<Isa>(lanes);
  }
}

template <class Isa>
inline void store_tail(float* p, int64_t n, const V16<Isa>& v) {
  if constexpr (requires { Isa::store_first(p, n, v.part[0]); }) {
    Isa::store_first(p, n, v.part[0]);
  } else {
    float lanes[16];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
}

template <class Isa>
inline V16<Isa> load_f16(const uint16_t* p) {
  V16<Isa> v;
  for (int i = 0; i < V16<Isa>::kParts; ++i) v.part[i] = Isa::from_f16(p + i * Isa::kLanes);
  return v;
}

template <class Isa>
inline V16<Isa> load_f16_tail(const uint16_t* p, int64_t n) {
  uint16_t lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_f16<Isa>(lanes);
}

#define EDGE_OPS_BINARY(op)                                                          \
  template <class Isa>                                                               \
  inline V16<Isa> operator op(const V16<Isa>& a, const V16<Isa>& b) {                \
    V16<Isa> r;                                                                      \
    for (int i = 0; i < V16<Isa>::kParts; ++i) r.part[i] = a.part[i] op b.part[i];   \
    return r;                                                                        \
  }
EDGE_OPS_BINARY(+)
EDGE_OPS_BINARY(-)
EDGE_OPS_BINARY(*)
EDGE_OPS_BINARY(/)
#undef EDGE_OPS_BINARY

// Folds lane i with lane i + 8, then i + 4, then i + 2, then i + 1: the one order of every sum of 16 lanes.
template <class Isa>
inline float sum_lanes(const V16<Isa>& v) {
  float lanes[16];
  store(lanes, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class Isa>
inline float max_lanes(const V16<Isa>& v) {
  float lanes[16];
  store(lanes, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] < lanes[i + half] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}

// The steps of sum_lanes that stay between whole machine vectors: what is left are kLanes partial sums.
template <class Isa>
inline typename Isa::Vec fold_parts(const V16<Isa>& v) {
  if constexpr (Isa::kLanes == 16) {
    return v.part[0];
  } else if constexpr (Isa::kLanes == 8) {
    return v.part[0] + v.part[1];
  } else {
    return (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
  }
}

// One step of sum_lanes on two vectors at once: groups of kGroup partial sums become groups of half that. Of every group the
// lower half of the lanes goes on with a's sums and the upper half with b's, so that of two sources only one is shuffled.
template <class Isa, int kGroup, int... kLane>
inline typename Isa::Vec merge(typename Isa::Vec a, typename Isa::Vec b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kGroup / 2;
  constexpr auto is_lower = [](int lane) { return lane % kGroup < kHalf; };
  return __builtin_shufflevector(a, b, (is_lower(kLane) ? kLane : Isa::kLanes + kLane)...) +
         __builtin_shufflevector(a, b, (is_lower(kLane) ? kLane + kHalf : Isa::kLanes + kLane - kHalf)...);
}

template <class Isa, int kGroup>
inline typename Isa::Vec merge(typename Isa::Vec a, typename Isa::Vec b) {
  return merge<Isa, kGroup>(a, b, std::make_integer_sequence<int, Isa::kLanes>());
}

// sum_lanes of kLanes vectors, 4 of whose sums every quad of lanes ends with, in two steps. The first takes those of one place
// in the quads: vectors i, 4 + i, 8 + i and so on.
template <class Isa>
inline typename Isa::Vec sum_quads(const V16<Isa>* v) {
  if constexpr (Isa::kLanes == 4) {
    return fold_parts<Isa>(v[0]);
  } else if constexpr (Isa::kLanes == 8) {
    return merge<Isa, 8>(fold_parts<Isa>(v[0]), fold_parts<Isa>(v[1]));
  } else {
    return merge<Isa, 8>(merge<Isa, 16>(v[0].part[0], v[2].part[0]), merge<Isa, 16>(v[1].part[0], v[3].part[0]));
  }
}

// The second, of all four places: lane j of the result belongs to vector j.
template <class Isa>
inline typename Isa::Vec sum_each(const typename Isa::Vec* quads) {
  return merge<Isa, 2>(merge<Isa, 4>(quads[0], quads[2]), merge<Isa, 4>(quads[1], quads[3]));
}

}  // namespace edge::ops
