#include "kernels/formats/tile_block.h"

#include <array>

#include "kernels/formats/decoders.h"

namespace edge {
namespace {

constexpr uint32_t kLowNibbles = 0x0f0f0f0fu;

// A run of a block's bytes in units of 4, 2 or 1 bytes. In the tile unit i of row r lies at (i * 16 + r) * unit: scales
// side by side, and values in words of four, so that one vector holds the same four k of all rows.
struct Field {
  int at;     // in the block of one row
  int bytes;
  int unit;
  uint32_t flip = 0;  // XOR of every word
};

// The fields of a block in the order of the tile.
constexpr Field kQ8_0[] = {{0, 2, 2}, {2, 32, 4, 0x80808080u}};  // unsigned bytes q + 128
constexpr Field kQ4_0[] = {{0, 2, 2}, {2, 16, 4}};
constexpr Field kMxfp4[] = {{0, 1, 1}, {1, 16, 4}};
constexpr Field kQ5_K[] = {{0, 2, 2}, {2, 2, 2}, {4, 12, 4}, {16, 32, 4}, {48, 128, 4}};
constexpr Field kQ2_K[] = {{80, 2, 2}, {82, 2, 2}, {0, 16, 4}, {16, 64, 4}};
constexpr Field kQ3_K[] = {{108, 2, 2}, {96, 12, 4}, {32, 64, 4}, {0, 32, 4}};
constexpr Field kIq4_Xs[] = {{0, 2, 2}, {2, 2, 2}, {4, 4, 4}, {8, 128, 4}};

// Field by field, kPut into the tile, else out of it.
template <const auto& kFields, bool kPut, typename Tile, typename Block>
inline void move_fields(Tile* __restrict tile, int64_t row, Block* __restrict block) {
  const auto move = [](auto* in_tile, auto* in_block, auto flip) {
    using Unit = decltype(flip);
    if constexpr (kPut) store(in_tile, static_cast<Unit>(load<Unit>(in_block) ^ flip));
    else store(in_block, static_cast<Unit>(load<Unit>(in_tile) ^ flip));
  };
  for (const Field& field : kFields) {
    for (int i = 0; i < field.bytes / field.unit; ++i) {
      auto* in_tile = tile + (i * 16 + row) * field.unit;
      auto* in_block = block + field.at + i * field.unit;
      if (field.unit == 4) move(in_tile, in_block, field.flip);
      if (field.unit == 2) move(in_tile, in_block, uint16_t{0});
      if (field.unit == 1) move(in_tile, in_block, uint8_t{0});
    }
    tile += field.bytes * 16;
  }
}

template <const auto& kFields>
void put(std::byte* tile, int64_t row, const std::byte* block) {
  move_fields<kFields, true>(tile, row, block);
}
template <const auto& kFields>
void take(const std::byte* tile, int64_t row, std::byte* block) {
  move_fields<kFields, false>(tile, row, block);
}

// n words of a row at tile bytes [s * 64 + row * 4].
void put_words(std::byte* __restrict tile, int64_t row, const std::byte* __restrict words, int n) {
  for (int s = 0; s < n; ++s) store(tile + s * 64 + row * 4, load<uint32_t>(words + s * 4));
}
void take_words(const std::byte* __restrict tile, int64_t row, std::byte* __restrict words, int n) {
  for (int s = 0; s < n; ++s) store(words + s * 4, load<uint32_t>(tile + s * 64 + row * 4));
}
void put_half(std::byte* tile, int64_t row, const std::byte* half) { store(tile + row * 2, load<uint16_t>(half)); }
void take_half(const std::byte* tile, int64_t row, std::byte* half) { store(half, load<uint16_t>(tile + row * 2)); }

// d[16], dmin[16], low[8][16], top[4][16], q[4 pairs][8 words][16 rows].
void put_q4_k(std::byte* tile, int64_t row, const std::byte* block) {
  put_half(tile, row, block);
  put_half(tile + 32, row, block + 2);
  uint8_t scales[8], mins[8];
  unpack_scales_and_mins(reinterpret_cast<const uint8_t*>(block) + 4, scales, mins);
  auto* low = reinterpret_cast<uint8_t*>(tile) + 64;
  for (int j = 0; j < 8; ++j) low[j * 16 + row] = static_cast<uint8_t>((scales[j] & 15) | (mins[j] & 15) << 4);
  uint8_t* top = low + 128;
  for (int j = 0; j < 8; j += 2) {
    const int even = scales[j] >> 4 | mins[j] >> 4 << 2;
    const int odd = scales[j + 1] >> 4 | mins[j + 1] >> 4 << 2;
    top[j / 2 * 16 + row] = static_cast<uint8_t>(even | odd << 4);
  }
  put_words(tile + 256, row, block + 16, 32);
}
void take_q4_k(const std::byte* tile, int64_t row, std::byte* block) {
  take_half(tile, row, block);
  take_half(tile + 32, row, block + 2);
  const auto* low = reinterpret_cast<const uint8_t*>(tile) + 64;
  const uint8_t* top = low + 128;
  auto* packed = reinterpret_cast<uint8_t*>(block) + 4;
  uint8_t scales[8], mins[8];
  for (int j = 0; j < 8; ++j) {
    const int nibble = top[j / 2 * 16 + row] >> (j % 2 * 4);
    scales[j] = static_cast<uint8_t>((low[j * 16 + row] & 15) | (nibble & 3) << 4);
    mins[j] = static_cast<uint8_t>(low[j * 16 + row] >> 4 | (nibble >> 2 & 3) << 4);
  }
  for (int j = 0; j < 4; ++j) {
    packed[j] = static_cast<uint8_t>(scales[j] | scales[4 + j] >> 4 << 6);
    packed[4 + j] = static_cast<uint8_t>(mins[j] | mins[4 + j] >> 4 << 6);
    packed[8 + j] = static_cast<uint8_t>((scales[4 + j] & 15) | (mins[4 + j] & 15) << 4);
  }
  take_words(tile + 256, row, block + 16, 32);
}

// d[16], scales[16 groups][16], low nibbles [4 pairs][8 words][16 rows], top bits [2 quads][8 words][16 rows].
// The block pairs runs 0 and 2, 1 and 3 of each 128 values in a byte; the tile pairs 0 and 1, 2 and 3.
void put_q6_k(std::byte* tile, int64_t row, const std::byte* block) {
  put_half(tile, row, block + 208);
  for (int group = 0; group < 16; ++group) tile[32 + group * 16 + row] = block[192 + group];
  for (int half = 0; half < 2; ++half) {
    std::byte* pairs = tile + 288 + half * 1024;
    for (int s = 0; s < 8; ++s) {
      const auto first = load<uint32_t>(block + half * 64 + s * 4);
      const auto second = load<uint32_t>(block + half * 64 + 32 + s * 4);
      store(pairs + s * 64 + row * 4, (first & kLowNibbles) | (second & kLowNibbles) << 4);
      store(pairs + 512 + s * 64 + row * 4, (first >> 4 & kLowNibbles) | (second & ~kLowNibbles));
    }
  }
  put_words(tile + 2336, row, block + 128, 16);
}
void take_q6_k(const std::byte* tile, int64_t row, std::byte* block) {
  take_half(tile, row, block + 208);
  for (int group = 0; group < 16; ++group) block[192 + group] = tile[32 + group * 16 + row];
  for (int half = 0; half < 2; ++half) {
    const std::byte* pairs = tile + 288 + half * 1024;
    for (int s = 0; s < 8; ++s) {
      const auto even = load<uint32_t>(pairs + s * 64 + row * 4);
      const auto odd = load<uint32_t>(pairs + 512 + s * 64 + row * 4);
      store(block + half * 64 + s * 4, (even & kLowNibbles) | (odd & kLowNibbles) << 4);
      store(block + half * 64 + 32 + s * 4, (even >> 4 & kLowNibbles) | (odd & ~kLowNibbles));
    }
  }
  take_words(tile + 2336, row, block + 128, 16);
}

struct FormatMoves {
  WeightFormat format;
  BlockMoves moves;
};

#define EDGE_FIELD_MOVES(format, fields, decode) {WeightFormat::format, {put<fields>, take<fields>, decode}}
constexpr FormatMoves kFormatMoves[] = {
    EDGE_FIELD_MOVES(kQ8_0, kQ8_0, decode_q8_0),
    EDGE_FIELD_MOVES(kQ4_0, kQ4_0, decode_q4_0),
    {WeightFormat::kQ4_K, {put_q4_k, take_q4_k, decode_q4_k}},
    {WeightFormat::kQ6_K, {put_q6_k, take_q6_k, decode_q6_k}},
    EDGE_FIELD_MOVES(kQ5_K, kQ5_K, decode_q5_k),
    EDGE_FIELD_MOVES(kQ2_K, kQ2_K, decode_q2_k),
    EDGE_FIELD_MOVES(kQ3_K, kQ3_K, decode_q3_k),
    EDGE_FIELD_MOVES(kIQ4_XS, kIq4_Xs, decode_iq4_xs),
    EDGE_FIELD_MOVES(kIQ4_NL, kQ4_0, decode_iq4_nl),
    EDGE_FIELD_MOVES(kMXFP4, kMxfp4, decode_mxfp4),
};

constexpr auto kMovesByCode = [] {
  std::array<BlockMoves, kTileFormats> table{};
  for (const FormatMoves& row : kFormatMoves) table[static_cast<size_t>(row.format)] = row.moves;
  return table;
}();
// Every format that is not plain floats has its moves.
static_assert([] {
  for (size_t i = 0; i < kTileFormats; ++i) {
    // Of rows, not of their pointers: GCC's undefined-behaviour sanitizer takes no address for a constant.
    bool has_row = false;
    for (const FormatMoves& row : kFormatMoves) has_row = has_row || row.format == static_cast<WeightFormat>(i);
    if (has_row == (kFormatTraits[i].act == ActKind::kF32)) return false;
  }
  return true;
}());

}  // namespace

const BlockMoves& block_moves(WeightFormat format) { return kMovesByCode[static_cast<size_t>(format)]; }

}  // namespace edge
