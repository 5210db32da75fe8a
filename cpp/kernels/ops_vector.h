// Sixteen floats at a time, whatever the machine's vectors hold: the unit in which every float operator is defined.
// Everything is a template over a type `Isa` from an anonymous namespace, so each ISA's code stays in its own file.
#pragma once

#include <cstdint>
#include <utility>

namespace edge::ops {

// Isa gives: kLanes (4, 8 or 16), Vec and IVec (vectors of kLanes float / int32_t), Vec from_f16(const uint16_t*),
// void to_f16(Vec, uint16_t*), uint32_t bits(IVec) (a bit for each lane that is -1; the others are 0), and the register
// tiles of attention (kScoreHeads, kValueHeads, kValueChunks).
template <class Isa>
struct V16 {
  static constexpr int kParts = 16 / Isa::kLanes;
  typename Isa::Vec part[kParts];
};

template <class Isa>
inline typename Isa::Vec splat(float value) {
  return typename Isa::Vec{} + value;
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

// The first n < 16 floats; the other lanes hold `fill`.
template <class Isa>
inline V16<Isa> load_tail(const float* p, int64_t n, float fill = 0) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < n ? p[i] : fill;
  return load<Isa>(lanes);
}

template <class Isa>
inline void store_tail(float* p, int64_t n, const V16<Isa>& v) {
  float lanes[16];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
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
  for (int i = 1; i < 16; ++i) lanes[0] = lanes[0] < lanes[i] ? lanes[i] : lanes[0];
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

// Where merge() takes output lane `lane` from (b's lanes follow a's). Groups of `group` partial sums become groups of
// half that: above 4 the groups of a come before those of b, from 4 down a and b share each quad of lanes.
constexpr int merge_source(int lane, int lanes, int group) {
  const int half = group / 2;
  if (group > 4) {
    const int out_group = lane / half;
    const int per_input = lanes / group;
    return out_group / per_input * lanes + out_group % per_input * group + lane % half;
  }
  const int quad = lane / 4 * 4;
  const int from_b = lane % 4 / 2;
  return from_b * lanes + quad + (group == 4 ? lane % 2 : lane % 2 * 2);
}

// One step of sum_lanes on two vectors at once.
template <class Isa, int kGroup, int... kLane>
inline typename Isa::Vec merge(typename Isa::Vec a, typename Isa::Vec b, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = Isa::kLanes;
  return __builtin_shufflevector(a, b, merge_source(kLane, kLanes, kGroup)...) +
         __builtin_shufflevector(a, b, (merge_source(kLane, kLanes, kGroup) + kGroup / 2)...);
}

template <class Isa, int kGroup>
inline typename Isa::Vec merge(typename Isa::Vec a, typename Isa::Vec b) {
  return merge<Isa, kGroup>(a, b, std::make_integer_sequence<int, Isa::kLanes>());
}

// sum_lanes of kLanes folded vectors at once: lane j of the result belongs to v[j].
template <class Isa>
inline typename Isa::Vec sum_each(const typename Isa::Vec* v) {
  typename Isa::Vec quad[4];
  for (int i = 0; i < 4; ++i) {
    if constexpr (Isa::kLanes == 4) {
      quad[i] = v[i];
    } else if constexpr (Isa::kLanes == 8) {
      quad[i] = merge<Isa, 8>(v[i], v[4 + i]);
    } else {
      quad[i] = merge<Isa, 8>(merge<Isa, 16>(v[i], v[4 + i]), merge<Isa, 16>(v[8 + i], v[12 + i]));
    }
  }
  return merge<Isa, 2>(merge<Isa, 4>(quad[0], quad[1]), merge<Isa, 4>(quad[2], quad[3]));
}

}  // namespace edge::ops
