// Rows of checkpoint blocks -> tiles of 16 rows, and back. Layouts: DESIGN.md, "Tiles"; formats/tile_block.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/status.h"
#include "kernels/format.h"
#include "kernels/formats/block.h"

namespace edge {

// tile_bytes of a shape that came from outside: kBadArgument unless rows >= 1, k is a positive multiple of the
// format's block and the size fits 63 bits.
Result<int64_t> checked_tile_bytes(WeightFormat format, int64_t rows, int64_t k);

// kBadArgument unless the bytes are exactly n_rows >= 1 rows of k values, k a positive multiple of the block.
Status check_rows(const BlockTraits& source, std::span<const std::byte> rows, int64_t n_rows, int64_t k);
Status check_tiles(WeightFormat format, std::span<const std::byte> tiles, int64_t rows, int64_t k);

// The tile format that holds the blocks of this type unchanged; false when there is none.
bool native_tile_format(const BlockTraits& block, WeightFormat* format);

// n_rows rows of k values, block after block -> tiles. The format's own block type is only re-arranged: every value
// keeps its bits. Another type is decoded to f32 and quantised: Q8_0 and Q4_0 as gguf.quants.quantize does it, F16 and
// BF16 to nearest even. Rows that fill up the last tile are zero blocks.
// kBadArgument: sizes do not fit, found and expected; kUnsupported: another type into a format that has no rounding
// (all but F32, F16, BF16, Q8_0, Q4_0), or no grid.
Status tile_rows(const BlockTraits& source, std::span<const std::byte> rows, int64_t n_rows, int64_t k,
                 WeightFormat format, std::span<std::byte> tiles);

// Tiles -> f32 [rows, k], padding rows dropped. kBadArgument when a size does not fit.
Status untile_rows(WeightFormat format, std::span<const std::byte> tiles, int64_t rows, int64_t k,
                   std::span<float> out);

// k values of row `row_in_tile` (0..15) of one tile. `tile` holds tile_stride_bytes(format, k) bytes; k is a multiple
// of the format's block. The bits are those of gguf.quants.dequantize of the row before it was tiled.
void decode_tile_row(WeightFormat format, const std::byte* tile, int64_t row_in_tile, int64_t k, float* out);

// n values -> blocks of the format (Q8_0, Q4_0) or plain values (F32, F16, BF16). n is a multiple of block_values.
void quantize_row(WeightFormat format, const float* values, int64_t n, std::byte* blocks);

}  // namespace edge
