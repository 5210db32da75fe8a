#include "kernels/neuron_rows.h"

#include <algorithm>
#include <cstring>

#include "kernels/formats/float_bits.h"
#include "kernels/tiling.h"

namespace edge {
namespace {

// The block type that holds the same numbers, 32 values or one.
struct Native {
  WeightFormat format;
  uint32_t ggml_type;
  int64_t block_values, block_bytes;
};

constexpr Native kNative[kNeuronFormats] = {{WeightFormat::kF16, 1, 1, 2},
                                            {WeightFormat::kQ8_0, 8, 32, 34},
                                            {WeightFormat::kQ4_0, 2, 32, 18}};

void put_halves(const std::byte* __restrict values, bool column, std::byte* __restrict group) {
  if (column) {
    std::memcpy(group, values, 512);
    return;
  }
  for (int k = 0; k < kNeuronGroupValues; ++k) {
    store(group + (k % 32 * 8 + k / 32) * 2, load<uint16_t>(values + 2 * k));
  }
}

// One block of 32 values: the scale, then n_words words of quants XOR flip. Q4_0 pairs values as columns and dot rows do.
void put_block(const std::byte* __restrict block, int lane, int n_words, uint32_t flip, bool column,
               std::byte* __restrict group) {
  store(group + 2 * lane, load<uint16_t>(block));
  std::byte* quants = group + 16;
  if (column) {
    std::memcpy(quants + lane * n_words * 4, block + 2, static_cast<size_t>(n_words) * 4);
    return;
  }
  for (int s = 0; s < n_words; ++s) store(quants + s * 32 + lane * 4, load<uint32_t>(block + 2 + 4 * s) ^ flip);
}

// 256 values in the native blocks.
void put_group(int index, const std::byte* blocks, bool column, std::byte* group) {
  if (index == 0) {
    put_halves(blocks, column, group);
    return;
  }
  for (int lane = 0; lane < 8; ++lane) {
    const std::byte* block = blocks + lane * kNative[index].block_bytes;
    put_block(block, lane, index == 1 ? 8 : 4, index == 1 ? 0x80808080u : 0, column, group);
  }
}

}  // namespace

Result<int64_t> checked_neuron_bytes(WeightFormat format, int64_t n_rows, int64_t hidden) {
  if (!is_neuron_format(format)) {
    return error(Code::kBadArgument, "neuron format: expected %u..%u, found %u",
                 static_cast<unsigned>(WeightFormat::kNeuronF16), static_cast<unsigned>(WeightFormat::kNeuronQ4),
                 static_cast<unsigned>(format));
  }
  if (n_rows < 1 || hidden < 1 || hidden > INT32_MAX) {
    return error(Code::kBadArgument, "neuron rows: expected at least 1 row of 1 to %d values, found %lld rows of %lld",
                 INT32_MAX, static_cast<long long>(n_rows), static_cast<long long>(hidden));
  }
  return checked_product(n_rows, neuron_row_bytes(format, hidden), "bytes of the neuron rows");
}

Status neuron_rows(const BlockTraits& source, std::span<const std::byte> rows, int64_t n_rows, int64_t hidden,
                   WeightFormat format, bool column, std::span<std::byte> out) {
  EDGE_ASSIGN(const int64_t expected, checked_neuron_bytes(format, n_rows, hidden));
  if (static_cast<int64_t>(out.size()) != expected) {
    return error(Code::kBadArgument, "neuron rows: expected room for %lld bytes, found %zu",
                 static_cast<long long>(expected), out.size());
  }
  EDGE_TRY(check_rows(source, rows, n_rows, hidden));
  EDGE_TRY(require_grid(source));
  const int index = neuron_index(format);
  const Native& native = kNative[index];
  const int64_t row_bytes = hidden / source.block_values * source.block_bytes;
  const int64_t group_bytes = kNeuronTraits[index].group_bytes;
  std::byte* group = out.data();
  float values[kNeuronGroupValues];
  std::byte blocks[kNeuronGroupValues * sizeof(float)];
  for (int64_t row = 0; row < n_rows; ++row) {
    const std::byte* from = rows.data() + row * row_bytes;
    for (int64_t first = 0; first < hidden; first += kNeuronGroupValues, group += group_bytes) {
      const int64_t n = std::min(kNeuronGroupValues, hidden - first);
      const std::byte* run = from + first / source.block_values * source.block_bytes;
      const bool same = native.ggml_type == source.ggml_type;
      if (same && n == kNeuronGroupValues) {
        put_group(index, run, column, group);
        continue;
      }
      std::fill(values + (same ? 0 : n), values + kNeuronGroupValues, 0.0f);
      if (!same) source.decode(run, n / source.block_values, values);
      quantize_row(native.format, values, kNeuronGroupValues, blocks);
      if (same) std::memcpy(blocks, run, static_cast<size_t>(n / source.block_values * source.block_bytes));
      put_group(index, blocks, column, group);
    }
  }
  return {};
}

}  // namespace edge
