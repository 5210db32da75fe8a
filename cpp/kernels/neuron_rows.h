// Rows of checkpoint blocks -> dot rows and column rows of neuron records. Layouts: kernels/neuron.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/status.h"
#include "kernels/format.h"
#include "kernels/formats/block.h"

namespace edge {

// n_rows rows of `hidden` values, block after block -> [n_rows, neuron_row_bytes(format, hidden)]. Q8_0 to q8, Q4_0 to
// q4 and F16 to f16 keep their bits; other types are decoded to f32 and rounded as tile_rows does it.
// kBadArgument: not a neuron format, or sizes do not fit, found and expected; kUnsupported: no grid.
Status neuron_rows(const BlockTraits& source, std::span<const std::byte> rows, int64_t n_rows, int64_t hidden,
                   WeightFormat format, bool column, std::span<std::byte> out);

// neuron_row_bytes of a shape that came from outside; kBadArgument unless hidden >= 1 and the size fits 63 bits.
Result<int64_t> checked_neuron_bytes(WeightFormat format, int64_t n_rows, int64_t hidden);

}  // namespace edge
