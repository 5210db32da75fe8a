// Block types of checkpoints (the ggml ids of GGUF): sizes and decoders, one row of the table per type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/status.h"

namespace edge {

// The lookup tables of the IQ1, IQ2 and IQ3 types come from outside (flashload/iq_grids.py) before the first decode.
enum class Grid : int { kNone = -1, kIq2Xxs, kIq2Xs, kIq2S, kIq3Xxs, kIq3S, kIq1 };
inline constexpr int kGrids = 6;

struct BlockTraits {
  uint32_t ggml_type;
  const char* name;
  int64_t block_values;
  int64_t block_bytes;
  // n_blocks blocks -> n_blocks * block_values floats, in the order of float operations of gguf.quants.dequantize.
  void (*decode)(const std::byte* blocks, int64_t n_blocks, float* out);
  Grid grid = Grid::kNone;
};

// Every block_values in the table divides this: a row is converted in runs of so many values.
inline constexpr int64_t kMaxBlockValues = 256;

// kUnsupported lists the known ids.
Result<const BlockTraits*> find_block_type(int64_t ggml_type);

// Sets the grid of one IQ type: `values` holds its entries one after the other. Setting the same values again is
// allowed; kBadArgument for a type without grid, a wrong size or other values than before.
Status set_grid(int64_t ggml_type, std::span<const int8_t> values);
// True when the type can be decoded now: it needs no grid or its grid is set.
bool grid_ready(const BlockTraits& block);
// kUnsupported when the grid is needed and not set.
Status require_grid(const BlockTraits& block);
// The entries of a grid that is set.
const int8_t* grid_values(Grid grid);

// n_values of `block` from exactly their bytes. kBadArgument on a wrong size, kUnsupported when the grid is missing.
Status decode_blocks(const BlockTraits& block, std::span<const std::byte> data, std::span<float> out);

// a * b of sizes that came from outside; kBadArgument names `what` when either is negative or the product overflows.
Result<int64_t> checked_product(int64_t a, int64_t b, const char* what);

}  // namespace edge
