// Rows of a pass as its feed-forward layers saw them, in memory of the caller's: what predictors and thresholds are
// fitted to.
#pragma once

#include <cstdint>
#include <span>

namespace edge {

// Each span is empty (not wanted) or holds every layer's rows, of which the first few are written. Rows are max_rows
// (of the decoder) apart per layer.
struct FfnCapture {
  std::span<uint16_t> inputs;  // f16 [n_layers][max_rows][hidden_size], infinite beyond its range
  std::span<uint16_t> gates;   // f16 [n_layers][max_rows][intermediate_size], before the activation
  std::span<float> norms;      // [n_layers][max_rows], length of the residual stream that the layer adds to
  std::span<uint8_t> open;     // [n_layers][max_rows][ceil(intermediate_size / 8)]; bit i % 8 of byte i / 8: gate i > 0
};

}  // namespace edge
