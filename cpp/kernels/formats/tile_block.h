// One block of one row in and out of a tile block of 16 rows: pure moves, the stored values keep their bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format.h"
#include "kernels/formats/float_bits.h"

namespace edge {

// Between a block of a checkpoint and row `row` (0..15) of a tile block.
using MoveBlock = void (*)(std::byte* tile, int64_t row, const std::byte* block);
using TakeBlock = void (*)(const std::byte* tile, int64_t row, std::byte* block);

struct BlockMoves {
  MoveBlock put;
  TakeBlock take;
  void (*decode)(const std::byte* blocks, int64_t n_blocks, float* out);
};

// Of a quantised tile format.
const BlockMoves& block_moves(WeightFormat format);

// n plain values of a row into the [k][16] layout.
template <typename T>
static inline void put_values(std::byte* __restrict tile, int64_t row, const std::byte* __restrict values, int64_t n) {
  const auto size = static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; ++i) store(tile + (i * 16 + row) * size, load<T>(values + i * size));
}

}  // namespace edge
