// How weights lie in memory and in the pack: tiles of 16 rows (layouts in DESIGN.md, "Tiles"), or one record per neuron
// (layouts in kernels/neuron.h).
#pragma once

#include <array>
#include <cstdint>

namespace edge {

// The tile formats by what they multiply with: X(arg, code, enumerator, name, scales, ggml_type, block_values,
// block_bytes). All that depends on the format alone comes from these rows: the enum, the traits, the kernels' names.
// Codes stand in packs: they are never given anew.
#define EDGE_FLOAT_FORMATS(X, arg)                  \
  X(arg, 0, kF32, f32, kNone, 0, 1, 4)              \
  X(arg, 1, kF16, f16, kNone, 1, 1, 2)              \
  X(arg, 2, kBF16, bf16, kNone, 30, 1, 2)
#define EDGE_Q8X32_FORMATS(X, arg)                  \
  X(arg, 3, kQ8_0, q8_0, kHalf, 8, 32, 34)          \
  X(arg, 4, kQ4_0, q4_0, kHalf, 2, 32, 18)          \
  X(arg, 11, kIQ4_NL, iq4_nl, kHalf, 20, 32, 18)    \
  X(arg, 12, kMXFP4, mxfp4, kExponent, 39, 32, 17)
#define EDGE_Q8X256_FORMATS(X, arg)                 \
  X(arg, 5, kQ4_K, q4_k, kTwoHalves, 12, 256, 144)  \
  X(arg, 6, kQ6_K, q6_k, kHalf, 14, 256, 210)       \
  X(arg, 7, kQ5_K, q5_k, kTwoHalves, 13, 256, 176)  \
  X(arg, 8, kQ2_K, q2_k, kTwoHalves, 10, 256, 84)   \
  X(arg, 9, kQ3_K, q3_k, kHalf, 11, 256, 110)       \
  X(arg, 10, kIQ4_XS, iq4_xs, kHalf, 23, 256, 136)
#define EDGE_TILE_FORMATS(X, arg) \
  EDGE_FLOAT_FORMATS(X, arg) EDGE_Q8X32_FORMATS(X, arg) EDGE_Q8X256_FORMATS(X, arg)

#define EDGE_FORMAT_CODE(arg, code, enumerator, ...) enumerator = code,
enum class WeightFormat : uint32_t {
  EDGE_TILE_FORMATS(EDGE_FORMAT_CODE, )
  kNeuronF16 = 20,
  kNeuronQ8 = 21,
  kNeuronQ4 = 22,
  kF32Vector = 100,  // norms, biases, tables: plain f32
  kBytes = 101,      // blobs
};

#undef EDGE_FORMAT_CODE

#define EDGE_FORMAT_COUNT(...) +1
inline constexpr int kTileFormats = EDGE_TILE_FORMATS(EDGE_FORMAT_COUNT, );
#undef EDGE_FORMAT_COUNT
inline constexpr int64_t kTileRows = 16;

// What a format multiplies with: floats, or int8 blocks of 32 or 256 activations.
enum class ActKind { kF32, kQ8x32, kQ8x256 };

// What a block of 16 rows begins with: nothing, f16 d[16], f16 d[16] and dmin[16], or one exponent byte a row.
enum class Scales { kNone, kHalf, kTwoHalves, kExponent };

struct FormatTraits {
  const char* name;
  ActKind act;
  Scales scales;
  uint32_t ggml_type;        // the block type whose bytes the tiles hold
  int64_t block_values;      // values of one row in one block along K
  int64_t block_bytes;       // of one row, in a checkpoint
  int64_t tile_block_bytes;  // of 16 rows: a tile only moves bytes
};

inline constexpr std::array<FormatTraits, kTileFormats> kFormatTraits = [] {
  std::array<FormatTraits, kTileFormats> table{};
#define EDGE_FORMAT_TRAITS(act, code, enumerator, name, scales, ggml_type, values, bytes) \
  table[code] = {#name, ActKind::act, Scales::scales, ggml_type, values, bytes, (bytes) * kTileRows};
  EDGE_FLOAT_FORMATS(EDGE_FORMAT_TRAITS, kF32)
  EDGE_Q8X32_FORMATS(EDGE_FORMAT_TRAITS, kQ8x32)
  EDGE_Q8X256_FORMATS(EDGE_FORMAT_TRAITS, kQ8x256)
#undef EDGE_FORMAT_TRAITS
  return table;
}();

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

// Bytes of one tile: 16 rows of k values; 0 of a format without tiles. k must be a multiple of block_values.
inline int64_t tile_stride_bytes(WeightFormat format, int64_t k) {
  if (!is_tile_format(format)) return 0;
  return k / traits(format).block_values * traits(format).tile_block_bytes;
}
inline int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t tile_bytes(WeightFormat format, int64_t rows, int64_t k) {
  return tile_count(rows) * tile_stride_bytes(format, k);
}

}  // namespace edge
