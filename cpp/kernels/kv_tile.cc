#include "kernels/kv_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/formats/float_bits.h"

namespace edge {
namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

struct Rounding {
  float inverse = 0;  // 0 where the values are zero, or too small for a scale
  uint16_t scale = 0;
};

// int8: the largest magnitude becomes 127. int4: it becomes -8, whatever its sign, so that all 16 values are used.
Rounding rounding(KvType type, const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::fabs(x[i]) > std::fabs(largest) ? x[i] : largest;
  const float scale = type == KvType::kInt4 ? largest * -0.125f : std::fabs(largest) * (1.0f / 127.0f);
  Rounding found;
  found.scale = float_to_half(scale);
  const float worth = half_to_float(found.scale);
  const float inverse = 1.0f / worth;
  // Behind f16's range nothing can be told apart: such a row is zero.
  if (!std::isfinite(worth) || !std::isfinite(inverse)) return {};
  found.inverse = inverse;
  return found;
}

int32_t rounded(float x, float inverse, float low, float high) {
  const float scaled = x * inverse;
  // NaN compares false: it becomes `low`.
  const float clamped = scaled > low ? (scaled < high ? scaled : high) : low;
  return static_cast<int32_t>((clamped + kRounder) - kRounder);
}

// Where a token's bytes of one tile lie: `first`, then every `step`, runs of `run` bytes.
struct Lane {
  int64_t first, run, step;
};
constexpr Lane key_lane(int64_t lane) { return {lane * 4, 4, 64}; }
Lane value_lane(const KvTileLayout& layout, int64_t lane) {
  return {lane / 2 * (layout.data_bytes() / 8) + lane % 2, 1, 2};
}

// Byte `i` of those that belong to a token.
std::byte& byte_of(std::byte* tile, const Lane& lane, int64_t i) {
  return tile[lane.first + i / lane.run * lane.step + i % lane.run];
}

// fn(d, byte index of the token, whether in the high nibble).
template <typename Fn>
void for_dims(const KvTileLayout& layout, Fn&& fn) {
  for (int64_t d = 0; d < layout.padded(); ++d) {
    if (layout.type == KvType::kInt8) fn(d, d, false);
    else fn(d, d / 32 * 16 + d % 16, d % 32 >= 16);
  }
}

void round_row(const KvTileLayout& layout, const float* x, const Lane& lane, std::byte* tile, uint16_t* scale) {
  const Rounding to = rounding(layout.type, x, layout.head_dim);
  const bool narrow = layout.type == KvType::kInt4;
  const float low = narrow ? -8 : -127, high = narrow ? 7 : 127;
  for_dims(layout, [&](int64_t d, int64_t at, bool upper) {
    const int32_t q = d < layout.head_dim && to.inverse != 0 ? rounded(x[d], to.inverse, low, high) : 0;
    std::byte& byte = byte_of(tile, lane, at);
    if (!narrow) byte = static_cast<std::byte>(q);
    else if (!upper) byte = static_cast<std::byte>(q + 8);
    else byte |= static_cast<std::byte>((q + 8) << 4);
  });
  std::memcpy(scale, &to.scale, sizeof to.scale);
}

void widen_row(const KvTileLayout& layout, const std::byte* tile, const Lane& lane, uint16_t scale, float* x) {
  const float worth = half_to_float(scale);
  for_dims(layout, [&](int64_t d, int64_t at, bool upper) {
    if (d >= layout.head_dim) return;
    const auto byte = static_cast<uint8_t>(byte_of(const_cast<std::byte*>(tile), lane, at));
    const int32_t q = layout.type == KvType::kInt8 ? static_cast<int8_t>(byte) : (upper ? byte >> 4 : byte & 15) - 8;
    x[d] = worth * static_cast<float>(q);
  });
}

uint16_t* scale_at(std::byte* keys, int64_t offset, int64_t lane) {
  return reinterpret_cast<uint16_t*>(keys + offset) + lane;
}
const uint16_t* scale_at(const std::byte* keys, int64_t offset, int64_t lane) {
  return reinterpret_cast<const uint16_t*>(keys + offset) + lane;
}

}  // namespace

void kv_rotate(float* x, int64_t head_dim) {
  const int64_t block = head_dim & -head_dim;
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (float* part = x; part < x + head_dim; part += block) {
    for (int64_t half = 1; half < block; half *= 2) {
      for (int64_t begin = 0; begin < block; begin += 2 * half) {
        for (int64_t i = begin; i < begin + half; ++i) {
          const float a = part[i], b = part[i + half];
          part[i] = a + b;
          part[i + half] = a - b;
        }
      }
    }
    for (int64_t i = 0; i < block; ++i) part[i] *= norm;
  }
}

void kv_store(const KvTileLayout& layout, const float* key, const float* value, int64_t lane, std::byte* keys,
              std::byte* values) {
  round_row(layout, key, key_lane(lane), keys, scale_at(keys, layout.key_scales(), lane));
  round_row(layout, value, value_lane(layout, lane), values, scale_at(keys, layout.value_scales(), lane));
}

void kv_copy(const KvTileLayout& layout, const std::byte* from_keys, const std::byte* from_values, int64_t from_lane,
             std::byte* keys, std::byte* values, int64_t lane) {
  const int64_t n_bytes = layout.data_bytes() / kKvTileTokens;
  const auto copy = [&](const std::byte* from, const Lane& from_at, std::byte* to, const Lane& to_at) {
    for (int64_t i = 0; i < n_bytes; ++i) byte_of(to, to_at, i) = byte_of(const_cast<std::byte*>(from), from_at, i);
  };
  copy(from_keys, key_lane(from_lane), keys, key_lane(lane));
  copy(from_values, value_lane(layout, from_lane), values, value_lane(layout, lane));
  for (const int64_t scales : {layout.key_scales(), layout.value_scales()}) {
    *scale_at(keys, scales, lane) = *scale_at(from_keys, scales, from_lane);
  }
}

void kv_clear(const KvTileLayout& layout, bool values, int64_t first, std::byte* tile) {
  const int64_t n_bytes = layout.data_bytes() / kKvTileTokens;
  for (int64_t lane = first; lane < kKvTileTokens; ++lane) {
    const Lane at = values ? value_lane(layout, lane) : key_lane(lane);
    for (int64_t i = 0; i < n_bytes; ++i) byte_of(tile, at, i) = std::byte{0};
    if (values) continue;
    *scale_at(tile, layout.key_scales(), lane) = *scale_at(tile, layout.value_scales(), lane) = 0;
  }
}

void kv_load(const KvTileLayout& layout, const std::byte* keys, const std::byte* values, int64_t lane, float* key,
             float* value) {
  widen_row(layout, keys, key_lane(lane), *scale_at(keys, layout.key_scales(), lane), key);
  widen_row(layout, values, value_lane(layout, lane), *scale_at(keys, layout.value_scales(), lane), value);
}

void kv_round_query(const float* x, int64_t head_dim, int8_t* q, float* scale, int32_t* sum) {
  float largest = 0;
  for (int64_t i = 0; i < head_dim; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float inverse = 127.0f / largest;
  const bool none = !std::isfinite(inverse) || !(largest > 0);
  *scale = none ? 0 : largest * (1.0f / 127.0f);
  *sum = 0;
  for (int64_t i = 0; i < kv_padded_dim(head_dim); ++i) {
    const int32_t value = none || i >= head_dim ? 0 : rounded(x[i], inverse, -127, 127);
    q[i] = static_cast<int8_t>(value);
    *sum += value;
  }
}

}  // namespace edge
