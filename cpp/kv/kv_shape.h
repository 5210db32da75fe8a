// What a key-value cache holds, and where: sizes of rows, pages and their halves.
#pragma once

#include <cstdint>

#include "io/block_reader.h"

namespace edge {

struct KvShape {
  int64_t n_layers = 0;
  int64_t kv_dim = 0;  // n_kv_heads * head_dim
  int64_t page_tokens = 64;
  bool padded = false;  // halves are multiples of 4096 bytes, as a drive takes them

  uint64_t row_bytes() const { return static_cast<uint64_t>(kv_dim) * 2; }  // one key, f16
  // The keys, or the values, of one layer in one page: [page_tokens][kv_dim].
  uint64_t half_bytes() const {
    const uint64_t bytes = row_bytes() * static_cast<uint64_t>(page_tokens);
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
