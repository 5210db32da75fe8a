#include "kernels/formats/block.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <string>

#include "kernels/formats/decoders.h"

namespace edge {
namespace {

constexpr BlockTraits kBlockTypes[] = {
    {0, "F32", 1, 4, decode_f32},
    {1, "F16", 1, 2, decode_f16},
    {2, "Q4_0", 32, 18, decode_q4_0},
    {3, "Q4_1", 32, 20, decode_q4_1},
    {6, "Q5_0", 32, 22, decode_q5_0},
    {7, "Q5_1", 32, 24, decode_q5_1},
    {8, "Q8_0", 32, 34, decode_q8_0},
    {10, "Q2_K", 256, 84, decode_q2_k},
    {11, "Q3_K", 256, 110, decode_q3_k},
    {12, "Q4_K", 256, 144, decode_q4_k},
    {13, "Q5_K", 256, 176, decode_q5_k},
    {14, "Q6_K", 256, 210, decode_q6_k},
    {16, "IQ2_XXS", 256, 66, decode_iq2_xxs, Grid::kIq2Xxs},
    {17, "IQ2_XS", 256, 74, decode_iq2_xs, Grid::kIq2Xs},
    {18, "IQ3_XXS", 256, 98, decode_iq3_xxs, Grid::kIq3Xxs},
    {19, "IQ1_S", 256, 50, decode_iq1_s, Grid::kIq1},
    {20, "IQ4_NL", 32, 18, decode_iq4_nl},
    {21, "IQ3_S", 256, 110, decode_iq3_s, Grid::kIq3S},
    {22, "IQ2_S", 256, 82, decode_iq2_s, Grid::kIq2S},
    {23, "IQ4_XS", 256, 136, decode_iq4_xs},
    {29, "IQ1_M", 256, 56, decode_iq1_m, Grid::kIq1},
    {30, "BF16", 1, 2, decode_bf16},
    {34, "TQ1_0", 256, 54, decode_tq1_0},
    {35, "TQ2_0", 256, 66, decode_tq2_0},
    {39, "MXFP4", 32, 17, decode_mxfp4},
    {40, "NVFP4", 64, 36, decode_nvfp4},
};

constexpr size_t kGridBytes[kGrids] = {256 * 8, 512 * 8, 1024 * 8, 256 * 4, 512 * 4, 2048 * 8};
constexpr size_t kLargestGridBytes = 2048 * 8;

int8_t grid_storage[kGrids][kLargestGridBytes];
std::atomic<bool> grid_is_set[kGrids];
std::mutex grid_mutex;

}  // namespace

Result<int64_t> checked_product(int64_t a, int64_t b, const char* what) {
  int64_t product = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product))
    return error(Code::kBadArgument, "%s: expected a size below 2^63, found %lld * %lld", what,
                 static_cast<long long>(a), static_cast<long long>(b));
  return product;
}

Result<const BlockTraits*> find_block_type(int64_t ggml_type) {
  std::string known;
  for (const BlockTraits& block : kBlockTypes) {
    if (block.ggml_type == ggml_type) return &block;
    if (!known.empty()) known += ", ";
    known += std::to_string(block.ggml_type);
    known += ' ';
    known += block.name;
  }
  return error(Code::kUnsupported, "block type: expected one of %s, found %lld", known.c_str(),
               static_cast<long long>(ggml_type));
}

Status set_grid(int64_t ggml_type, std::span<const int8_t> values) {
  EDGE_ASSIGN(const BlockTraits* block, find_block_type(ggml_type));
  if (block->grid == Grid::kNone) return error(Code::kBadArgument, "%s: has no grid to set", block->name);
  const auto index = static_cast<size_t>(block->grid);
  if (values.size() != kGridBytes[index])
    return error(Code::kBadArgument, "grid of %s: expected %zu values, found %zu", block->name, kGridBytes[index],
                 values.size());
  const std::lock_guard lock(grid_mutex);
  if (grid_is_set[index].load(std::memory_order_relaxed)) {
    // A decode may be reading the storage: it is written once and never again.
    if (std::memcmp(grid_storage[index], values.data(), values.size()) == 0) return {};
    return error(Code::kBadArgument, "grid of %s: expected the values set before, found others", block->name);
  }
  std::memcpy(grid_storage[index], values.data(), values.size());
  grid_is_set[index].store(true, std::memory_order_release);
  return {};
}

bool grid_ready(const BlockTraits& block) {
  return block.grid == Grid::kNone || grid_is_set[static_cast<size_t>(block.grid)].load(std::memory_order_acquire);
}

Status require_grid(const BlockTraits& block) {
  if (grid_ready(block)) return {};
  return error(Code::kUnsupported, "%s: expected its grid to be set (flashload.iq_grids), found none", block.name);
}

const int8_t* grid_values(Grid grid) { return grid_storage[static_cast<size_t>(grid)]; }

Status decode_blocks(const BlockTraits& block, std::span<const std::byte> data, std::span<float> out) {
  const auto n_values = static_cast<int64_t>(out.size());
  if (n_values % block.block_values != 0)
    return error(Code::kBadArgument, "%s: expected a multiple of %lld values, found %lld", block.name,
                 static_cast<long long>(block.block_values), static_cast<long long>(n_values));
  const int64_t n_blocks = n_values / block.block_values;
  EDGE_ASSIGN(const int64_t expected, checked_product(n_blocks, block.block_bytes, block.name));
  if (data.size() != static_cast<size_t>(expected))
    return error(Code::kBadArgument, "%s: expected %lld bytes for %lld values, found %zu", block.name,
                 static_cast<long long>(expected), static_cast<long long>(n_values), data.size());
  EDGE_TRY(require_grid(block));
  block.decode(data.data(), n_blocks, out.data());
  return {};
}

}  // namespace edge
