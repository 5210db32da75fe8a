// How weights lie in memory and in the pack: tiles of 16 rows (layouts in DESIGN.md, "Tiles"), or one record per neuron
// (layouts in kernels/neuron.h).
#pragma once

#include <cstdint>

namespace edge {

enum class WeightFormat : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kQ8_0 = 3,
  kQ4_0 = 4,
  kQ4_K = 5,
  kQ6_K = 6,
  kNeuronF16 = 20,
  kNeuronQ8 = 21,
  kNeuronQ4 = 22,
  kF32Vector = 100,  // norms, biases, tables: plain f32
  kBytes = 101,      // blobs
};

inline constexpr int kTileFormats = 7;
inline constexpr int64_t kTileRows = 16;

struct FormatTraits {
  const char* name;
  int64_t block_values;    // values of one row in one block along K
  int64_t tile_block_bytes;  // bytes of one block of 16 rows
};

inline constexpr FormatTraits kFormatTraits[kTileFormats] = {
    {"f32", 1, 64},      {"f16", 1, 32},      {"bf16", 1, 32},    {"q8_0", 32, 544},
    {"q4_0", 32, 288},   {"q4_k", 256, 2304}, {"q6_k", 256, 3360},
};

inline bool is_tile_format(WeightFormat format) { return static_cast<uint32_t>(format) < kTileFormats; }
inline const FormatTraits& traits(WeightFormat format) { return kFormatTraits[static_cast<uint32_t>(format)]; }

// Neuron formats: an entry is [neurons][parts][row_bytes], one hash per neuron. parts is 1 (gates), 2 (up, down) or
// 3 (gate, up, down); a row holds hidden_size values, padded with zeros to groups of 256.
inline constexpr int kNeuronFormats = 3;
inline constexpr int64_t kNeuronGroupValues = 256;
inline constexpr int64_t kMaxNeuronParts = 3;

struct NeuronTraits {
  const char* name;
  int64_t group_bytes;  // of one row
};

inline constexpr NeuronTraits kNeuronTraits[kNeuronFormats] = {
    {"neuron_f16", 512}, {"neuron_q8", 272}, {"neuron_q4", 144}};

// Position in tables of kNeuronFormats; meaningless for other formats.
inline int neuron_index(WeightFormat format) {
  return static_cast<int>(static_cast<uint32_t>(format) - static_cast<uint32_t>(WeightFormat::kNeuronF16));
}
inline bool is_neuron_format(WeightFormat format) {
  return format >= WeightFormat::kNeuronF16 && format <= WeightFormat::kNeuronQ4;
}
inline int64_t neuron_groups(int64_t hidden) { return (hidden + kNeuronGroupValues - 1) / kNeuronGroupValues; }
inline int64_t neuron_row_bytes(WeightFormat format, int64_t hidden) {
  return neuron_groups(hidden) * kNeuronTraits[neuron_index(format)].group_bytes;
}

// Bytes of one tile: 16 rows of k values. k must be a multiple of block_values.
inline int64_t tile_stride_bytes(WeightFormat format, int64_t k) {
  return k / traits(format).block_values * traits(format).tile_block_bytes;
}
inline int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t tile_bytes(WeightFormat format, int64_t rows, int64_t k) {
  return tile_count(rows) * tile_stride_bytes(format, k);
}

}  // namespace edge
