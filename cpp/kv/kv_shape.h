// What a key-value cache holds, and where: sizes of rows, pages and their halves.
#pragma once

#include <cstdint>

#include "io/block_reader.h"
#include "kernels/kv_tile.h"

namespace edge {

struct KvShape {
  int64_t n_layers = 0;
  int64_t kv_dim = 0;  // n_kv_heads * head_dim
  int64_t page_tokens = 64;
  bool padded = false;  // halves are multiples of 4096 bytes, as a drive takes them
  KvType type = KvType::kF16;
  int64_t head_dim = 0;  // of other types than f16

  KvTileLayout tile() const { return {type, head_dim}; }
  int64_t n_tiles() const { return kv_dim / head_dim; }  // one per head
  // In 4 bits a text's last tokens are kept as f16 besides: those of the block of kTailTokens positions that the next one is
  // in, and those staged. A row at `position` sees rounded keys before tail_begin().
  static constexpr int64_t kTailTokens = 64;
  static int64_t tail_begin(KvType type, int64_t position) {
    return type == KvType::kInt4 ? position / kTailTokens * kTailTokens : position + 1;
  }
  bool has_tail() const { return type == KvType::kInt4; }
  // All layers of one block of the tail.
  uint64_t tail_bytes() const {
    return has_tail() ? row_bytes() * static_cast<uint64_t>(kTailTokens * 2 * n_layers) : 0;
  }
  uint64_t row_bytes() const { return static_cast<uint64_t>(kv_dim) * 2; }  // one key, f16
  // The keys, or the values, of one layer and kKvTileTokens tokens: [token][kv_dim] f16, or a tile for each head.
  uint64_t group_bytes() const {
    if (type == KvType::kF16) return row_bytes() * kKvTileTokens;
    return static_cast<uint64_t>(n_tiles() * tile().bytes());
  }
  // The keys, or the values, of one layer in one page: groups one after the other.
  uint64_t half_bytes() const {
    const uint64_t bytes = group_bytes() * static_cast<uint64_t>(page_tokens / kKvTileTokens);
    return padded ? round_up(bytes, kReadAlign) : bytes;
  }
  uint64_t page_bytes() const { return half_bytes() * 2 * static_cast<uint64_t>(n_layers); }
  int64_t pages_for(int64_t tokens) const { return (tokens + page_tokens - 1) / page_tokens; }
};

// A page is in memory (frame >= 0), in the file (place >= 0), in both, or (nothing written yet) in neither.
struct KvPage {
  int32_t frame = -1;
  int32_t place = -1;
};

enum KvHalf : int64_t { kKeys = 0, kValues = 1 };

}  // namespace edge
