#include "kernels/tiling.h"

#include <algorithm>
#include <cstring>

#include "kernels/formats/float_bits.h"
#include "kernels/formats/tile_block.h"

namespace edge {
namespace {

bool has_quantizer(WeightFormat format) { return format <= WeightFormat::kQ4_0; }

// Puts n values of row r, in the format's own blocks, at value `first` of the tile.
void put_run(WeightFormat format, std::byte* tile, int64_t first, int64_t r, const std::byte* blocks, int64_t n) {
  const FormatTraits& of = traits(format);
  std::byte* into = tile + first / of.block_values * of.tile_block_bytes;
  if (format == WeightFormat::kF32) return put_values<uint32_t>(into, r, blocks, n);
  if (of.act == ActKind::kF32) return put_values<uint16_t>(into, r, blocks, n);
  const MoveBlock put = block_moves(format).put;
  for (int64_t b = 0; b < n / of.block_values; ++b) put(into + b * of.tile_block_bytes, r, blocks + b * of.block_bytes);
}

}  // namespace

Result<int64_t> checked_tile_bytes(WeightFormat format, int64_t rows, int64_t k) {
  if (!is_tile_format(format))
    return error(Code::kBadArgument, "tile format: expected 0..%d, found %u", kTileFormats - 1,
                 static_cast<unsigned>(format));
  const FormatTraits& format_traits = traits(format);
  if (rows < 1)
    return error(Code::kBadArgument, "tiles: expected at least 1 row, found %lld", static_cast<long long>(rows));
  if (k < 1 || k % format_traits.block_values != 0)
    return error(Code::kBadArgument, "%s tiles: expected k a positive multiple of %lld, found %lld", format_traits.name,
                 static_cast<long long>(format_traits.block_values), static_cast<long long>(k));
  EDGE_ASSIGN(const int64_t stride,
              checked_product(k / format_traits.block_values, format_traits.tile_block_bytes, "bytes of a tile"));
  return checked_product(rows / kTileRows + (rows % kTileRows != 0), stride, "bytes of the tiles");
}

Status check_rows(const BlockTraits& source, std::span<const std::byte> rows, int64_t n_rows, int64_t k) {
  const auto found_bytes = static_cast<int64_t>(rows.size());
  if (k < 1 || n_rows < 1 || k % source.block_values != 0)
    return error(Code::kBadArgument,
                 "%s rows: expected at least 1 row of a positive multiple of %lld values, found %lld rows of %lld",
                 source.name, static_cast<long long>(source.block_values), static_cast<long long>(n_rows),
                 static_cast<long long>(k));
  EDGE_ASSIGN(const int64_t row_bytes, checked_product(k / source.block_values, source.block_bytes, "bytes of a row"));
  EDGE_ASSIGN(const int64_t expected, checked_product(n_rows, row_bytes, "bytes of the rows"));
  if (found_bytes == expected) return {};
  return error(Code::kBadArgument, "%s rows: expected %lld bytes for %lld rows of %lld values, found %lld", source.name,
               static_cast<long long>(expected), static_cast<long long>(n_rows), static_cast<long long>(k),
               static_cast<long long>(found_bytes));
}

Status check_tiles(WeightFormat format, std::span<const std::byte> tiles, int64_t rows, int64_t k) {
  const auto found_bytes = static_cast<int64_t>(tiles.size());
  EDGE_ASSIGN(const int64_t expected, checked_tile_bytes(format, rows, k));
  if (found_bytes == expected) return {};
  return error(Code::kBadArgument, "%s tiles: expected %lld bytes for %lld rows of %lld values, found %lld",
               traits(format).name, static_cast<long long>(expected), static_cast<long long>(rows),
               static_cast<long long>(k), static_cast<long long>(found_bytes));
}

bool native_tile_format(const BlockTraits& block, WeightFormat* format) {
  for (uint32_t i = 0; i < kTileFormats; ++i) {
    if (kFormatTraits[i].ggml_type != block.ggml_type) continue;
    *format = static_cast<WeightFormat>(i);
    return true;
  }
  return false;
}

Status tile_rows(const BlockTraits& source, std::span<const std::byte> rows, int64_t n_rows, int64_t k,
                 WeightFormat format, std::span<std::byte> tiles) {
  EDGE_TRY(check_tiles(format, tiles, n_rows, k));
  EDGE_TRY(check_rows(source, rows, n_rows, k));
  const bool same = traits(format).ggml_type == source.ggml_type;
  if (!same && !has_quantizer(format))
    return error(Code::kUnsupported, "%s tiles: expected blocks of type %s, found %s", traits(format).name,
                 traits(format).name, source.name);
  EDGE_TRY(require_grid(source));

  const int64_t row_bytes = k / source.block_values * source.block_bytes;
  const int64_t tile_stride = tile_stride_bytes(format, k);
  const auto run_bytes = [&](int64_t n) { return n / source.block_values * source.block_bytes; };
  // One run of a row: large enough for any block, and small enough that a tile's run stays in the first cache.
  float values[kMaxBlockValues];
  std::byte blocks[kMaxBlockValues * sizeof(float)];
  constexpr std::byte kZeroBlocks[kMaxBlockValues * sizeof(float)] = {};
  for (int64_t t = 0; t < tile_count(n_rows); ++t) {
    std::byte* tile = tiles.data() + t * tile_stride;
    for (int64_t first = 0; first < k; first += kMaxBlockValues) {
      const int64_t n = std::min(kMaxBlockValues, k - first);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = t * kTileRows + r;
        if (row >= n_rows) {
          put_run(format, tile, first, r, kZeroBlocks, n);
          continue;
        }
        const std::byte* run = rows.data() + row * row_bytes + run_bytes(first);
        if (!same) {
          source.decode(run, n / source.block_values, values);
          quantize_row(format, values, n, blocks);
          run = blocks;
        }
        put_run(format, tile, first, r, run, n);
      }
    }
  }
  return {};
}

void decode_tile_row(WeightFormat format, const std::byte* tile, int64_t row_in_tile, int64_t k, float* out) {
  switch (format) {
    case WeightFormat::kF32:
      for (int64_t i = 0; i < k; ++i) out[i] = load<float>(tile + (i * kTileRows + row_in_tile) * 4);
      return;
    case WeightFormat::kF16:
      for (int64_t i = 0; i < k; ++i) out[i] = load_half(tile + (i * kTileRows + row_in_tile) * 2);
      return;
    case WeightFormat::kBF16:
      for (int64_t i = 0; i < k; ++i)
        out[i] = bfloat_to_float(load<uint16_t>(tile + (i * kTileRows + row_in_tile) * 2));
      return;
    default: break;
  }
  const FormatTraits& of = traits(format);
  const BlockMoves& moves = block_moves(format);
  std::byte block[kMaxBlockValues];
  for (int64_t first = 0; first < k; first += of.block_values, tile += of.tile_block_bytes) {
    moves.take(tile, row_in_tile, block);
    moves.decode(block, 1, out + first);
  }
}

Status untile_rows(WeightFormat format, std::span<const std::byte> tiles, int64_t rows, int64_t k,
                   std::span<float> out) {
  EDGE_TRY(check_tiles(format, tiles, rows, k));
  EDGE_ASSIGN(const int64_t n_values, checked_product(rows, k, "values of the rows"));
  if (out.size() != static_cast<size_t>(n_values))
    return error(Code::kBadArgument, "untiled rows: expected room for %lld values, found %zu",
                 static_cast<long long>(n_values), out.size());
  for (int64_t row = 0; row < rows; ++row)
    decode_tile_row(format, tiles.data() + row / kTileRows * tile_stride_bytes(format, k), row % kTileRows, k,
                    out.data() + row * k);
  return {};
}

}  // namespace edge
