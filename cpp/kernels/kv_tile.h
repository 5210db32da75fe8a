// Keys and values of 8 or 4 bits. One head's share of 16 tokens is a tile, laid out as integer dot products want it:
// keys with a lane per token, values with a lane per dimension and two tokens side by side.
//
//   int8 keys     [dim / 4][token][dim % 4]                            q
//   int4 keys     [dim / 32][dim % 16 / 4][token][dim % 4]             q + 8, dims 0..15 of 32 in the low nibble
//   int8 values   [token / 2][dim][token % 2]                          q
//   int4 values   [token / 2][dim / 32][dim % 16][token % 2]           q + 8, nibbles likewise
//
// then, in a tile of keys, f16 scales [16] of the keys and [16] of the values: a key is worth d q. Dims are padded to 32 with zeros.
// A token's values are rounded by themselves, when they are computed: no result depends on what else was in the batch.
// Every byte but the scales belongs to one token, so rows of a tile may be written by several threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

enum class KvType : uint8_t { kF16, kInt8, kInt4 };

inline constexpr int64_t kKvTileTokens = 16;

inline int64_t kv_padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

// One head of one tile.
struct KvTileLayout {
  KvType type = KvType::kInt8;
  int64_t head_dim = 0;

  int64_t padded() const { return kv_padded_dim(head_dim); }
  int64_t data_bytes() const { return kKvTileTokens * padded() / (type == KvType::kInt4 ? 2 : 1); }
  int64_t key_scales() const { return data_bytes(); }  // where they are
  int64_t value_scales() const { return key_scales() + kKvTileTokens * 2; }
  int64_t bytes() const { return value_scales() + kKvTileTokens * 2; }  // a multiple of 64
};

// Rotates x [head_dim] by an orthonormal Hadamard matrix over blocks of the largest power of two that divides head_dim:
// what stands out in one dimension is spread over all (QuaRot, arXiv 2404.00456, section 4). Its own inverse.
void kv_rotate(float* x, int64_t head_dim);

// Rounds one token's key and value [head_dim] into token `lane` of a head's tiles.
void kv_store(const KvTileLayout& layout, const float* key, const float* value, int64_t lane, std::byte* keys,
              std::byte* values);
// The same bits from another tile.
void kv_copy(const KvTileLayout& layout, const std::byte* from_keys, const std::byte* from_values, int64_t from_lane,
             std::byte* keys, std::byte* values, int64_t lane);
// Tokens from `first` on of a tile of keys, or of values, become zero.
void kv_clear(const KvTileLayout& layout, bool values, int64_t first, std::byte* tile);
// What a token's key and value are worth; for tests.
void kv_load(const KvTileLayout& layout, const std::byte* keys, const std::byte* values, int64_t lane, float* key,
             float* value);

// Queries as int8: q [padded], what one is worth, and their sum (an offset of the keys is taken off afterwards).
void kv_round_query(const float* x, int64_t head_dim, int8_t* q, float* scale, int32_t* sum);

}  // namespace edge
