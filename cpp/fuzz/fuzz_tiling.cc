// Any blocks in any shape: tiling and untiling stay inside their buffers, refuse wrong sizes, and keep every value.
#include <bit>
#include <cmath>

#include "fuzz/fuzz_input.h"
#include "kernels/tiling.h"

namespace edge::fuzz {
namespace {

constexpr int kTypes[] = {0,  1,  2,  3,  6,  7,  8,  10, 11, 12, 13, 14, 16,
                          17, 18, 19, 20, 21, 22, 23, 29, 30, 34, 35, 39, 40};

// Values of no meaning: the fuzzer looks at bounds, not at what a grid says.
void set_grids() {
  constexpr struct {
    int type;
    size_t values;
  } kGridSizes[] = {{16, 2048}, {17, 4096}, {22, 8192}, {18, 1024}, {21, 2048}, {19, 16384}};
  for (const auto& grid : kGridSizes) FUZZ_REQUIRE(set_grid(grid.type, std::vector<int8_t>(grid.values, 3)).ok());
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const bool bits = std::bit_cast<uint32_t>(a[i]) == std::bit_cast<uint32_t>(b[i]);
    if (!bits && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return a.size() == b.size();
}

void fuzz_tiling(Input& input) {
  const BlockTraits& source = **find_block_type(kTypes[input.take<uint8_t>() % std::size(kTypes)]);
  const auto format = static_cast<WeightFormat>(input.take<uint8_t>() % kTileFormats);
  const int64_t rows = 1 + input.take<uint8_t>() % 40;
  const bool whole = input.take<uint8_t>() % 2 == 0;
  const int64_t k = whole ? 256 * (1 + input.take<uint8_t>() % 3) : input.take<uint16_t>() % 600;
  const auto row_delta = static_cast<int64_t>(input.take<int8_t>()) / 100;
  const auto tile_delta = static_cast<int64_t>(input.take<int8_t>()) / 100;
  const int64_t row_bytes = rows * (k / source.block_values) * source.block_bytes;
  std::vector<std::byte> blocks(static_cast<size_t>(std::max<int64_t>(0, row_bytes + row_delta)));
  input.fill(blocks);

  const Result<int64_t> size = checked_tile_bytes(format, rows, k);
  if (!size.ok()) return;
  std::vector<std::byte> tiles(static_cast<size_t>(std::max<int64_t>(0, *size + tile_delta)));
  const Status tiled = tile_rows(source, blocks, rows, k, format, tiles);
  if (row_delta != 0 || tile_delta != 0) {
    FUZZ_REQUIRE(!tiled.ok());
    return;
  }
  if (!tiled.ok()) return;
  std::vector<float> values(static_cast<size_t>(rows * k));
  FUZZ_REQUIRE(untile_rows(format, tiles, rows, k, values).ok());
  WeightFormat own;
  if (!native_tile_format(source, &own) || own != format) return;
  std::vector<float> direct(values.size());
  FUZZ_REQUIRE(decode_blocks(source, blocks, direct).ok());
  FUZZ_REQUIRE(same(values, direct));
}

}  // namespace
}  // namespace edge::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool ready = (edge::fuzz::set_grids(), true);
  FUZZ_REQUIRE(ready);
  edge::fuzz::Input input(data, size);
  edge::fuzz::fuzz_tiling(input);
  return 0;
}
