#include <algorithm>
#include <cmath>

#include "engine/sequence.h"

namespace edge {
namespace {

int64_t open_bytes(int64_t n_neurons) { return (n_neurons + 7) / 8; }

float length(const float* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return static_cast<float>(std::sqrt(sum));
}

Status check(const char* what, size_t found, int64_t n_layers, int64_t n_rows, int64_t width) {
  const auto expected = static_cast<size_t>(n_layers * n_rows * width);
  if (found == 0 || found == expected) return {};
  return error(Code::kBadArgument, "capture: %s: expected %lld layers of %lld rows of %lld, found %zu items", what,
               static_cast<long long>(n_layers), static_cast<long long>(n_rows), static_cast<long long>(width), found);
}

}  // namespace

Result<int64_t> Sequence::capture(const FfnCapture& into) {
  Decoder& decoder = engine_.decoder();
  const DecoderConfig& config = decoder.config();
  const Kernels& kernels = engine_.kernels();
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size, most = decoder.max_rows();
  EDGE_TRY(check("inputs", into.inputs.size(), config.n_layers, most, hidden));
  EDGE_TRY(check("gates", into.gates.size(), config.n_layers, most, inner));
  EDGE_TRY(check("norms", into.norms.size(), config.n_layers, most, 1));
  EDGE_TRY(check("open", into.open.size(), config.n_layers, most, open_bytes(inner)));
  const int64_t n_rows = std::min(n_pending(), most);
  int64_t n_seen = 0;
  decoder.watch_ffn = [&](const FfnRows& rows) {
    for (int64_t i = 0; i < rows.n_rows; ++i) {
      const int64_t at = rows.layer * most + rows.first_row + i;
      const float* gate = rows.gate + i * pad16(inner);
      if (!into.inputs.empty()) kernels.to_f16(rows.input + i * pad16(hidden), hidden, into.inputs.data() + at * hidden);
      if (!into.gates.empty()) kernels.to_f16(gate, inner, into.gates.data() + at * inner);
      if (!into.norms.empty()) into.norms[static_cast<size_t>(at)] = length(rows.residual + i * pad16(hidden), hidden);
      if (into.open.empty()) continue;
      uint8_t* bits = into.open.data() + at * open_bytes(inner);
      std::fill_n(bits, open_bytes(inner), uint8_t{0});
      for (int64_t n = 0; n < inner; ++n) bits[n / 8] |= static_cast<uint8_t>((gate[n] > 0.0f) << (n % 8));
    }
    n_seen += rows.n_rows;
  };
  const Status status = advance();
  decoder.watch_ffn = nullptr;
  EDGE_TRY(status);
  if (n_seen != n_rows * config.n_layers) {
    return error(Code::kBadArgument, "capture: expected %lld dense layers whose gates are computed, found %lld",
                 static_cast<long long>(config.n_layers), static_cast<long long>(n_seen / std::max<int64_t>(n_rows, 1)));
  }
  return n_rows;
}

}  // namespace edge
