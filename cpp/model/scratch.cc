#include "model/scratch.h"

#include <algorithm>

#include "model/carver.h"
#include "model/linear.h"

namespace edge {
namespace {

uint64_t carve(Scratch& scratch, std::byte* base, const DecoderConfig& config, int64_t max_rows) {
  Carver carver(base);
  const int64_t hidden = pad16(config.hidden_size), ffn = pad16(config.ffn_dim());
  const int64_t half = static_cast<int64_t>(config.rope_inv_freq.size());
  scratch.hidden = carver.floats(max_rows * hidden);
  scratch.normed = carver.floats(max_rows * hidden);
  scratch.q = carver.floats(max_rows * pad16(config.q_dim()));
  scratch.k = carver.floats(max_rows * pad16(config.kv_dim()));
  scratch.v = carver.floats(max_rows * pad16(config.kv_dim()));
  scratch.attended = carver.floats(max_rows * pad16(config.q_dim()));
  scratch.projected = carver.floats(max_rows * hidden);
  scratch.gate = carver.floats(max_rows * ffn);
  scratch.up = carver.floats(max_rows * ffn);
  scratch.cos = carver.floats(max_rows * half);
  scratch.sin = carver.floats(max_rows * half);
  scratch.logits = carver.floats(Scratch::kLogitRows * pad16(config.vocab_size));
  const int64_t widest = std::max({config.hidden_size, config.q_dim(), config.ffn_dim()});
  const uint64_t act_bytes = ActRows::bytes(max_rows, widest);
  scratch.acts = {carver.take(act_bytes), act_bytes};
  if (config.n_experts > 0) {
    scratch.router = carver.floats(max_rows * pad16(config.n_experts));
    scratch.expert_in = carver.floats(max_rows * hidden);
    scratch.expert_out = carver.floats(max_rows * hidden);
  }
  if (config.by_neuron && config.intermediate_size > 0) {
    const int64_t rows = std::min(max_rows, Scratch::kNeuronRows), neurons = config.intermediate_size;
    const int64_t act_bytes = std::max(neuron_act_bytes(WeightFormat::kNeuronF16, config.hidden_size),
                                       neuron_act_bytes(WeightFormat::kNeuronQ8, config.hidden_size));
    scratch.neuron_acts = carver.take(static_cast<uint64_t>(rows * act_bytes));
    scratch.neuron_out = carver.floats(rows * pad32(config.hidden_size));
    const auto each = [&](uint64_t bytes) { return carver.take(static_cast<uint64_t>(neurons) * bytes); };
    scratch.neuron_rows = reinterpret_cast<uint64_t*>(carver.take(static_cast<uint64_t>(neurons + 63) / 64 * 64 * 8));
    scratch.records = reinterpret_cast<const std::byte**>(each(sizeof(std::byte*)));
    scratch.neurons = reinterpret_cast<int32_t*>(each(sizeof(int32_t)));
    scratch.expected = reinterpret_cast<int32_t*>(each(sizeof(int32_t)));
    scratch.computed = reinterpret_cast<bool*>(each(sizeof(bool)));
    scratch.score_bin = reinterpret_cast<uint8_t*>(each(sizeof(uint8_t)));
    scratch.score_row = reinterpret_cast<uint8_t*>(each(sizeof(uint8_t)));
  }
  return carver.used();
}

}  // namespace

uint64_t Scratch::bytes(const DecoderConfig& config, int64_t max_rows) {
  Scratch scratch;
  return carve(scratch, nullptr, config, max_rows);
}

Result<Scratch> Scratch::create(const DecoderConfig& config, int64_t max_rows, Budget& budget) {
  Scratch scratch;
  EDGE_ASSIGN(scratch.memory, budget.reserve(bytes(config, max_rows), "activations"));
  scratch.memory.populate();  // the first prompt writes all of it
  carve(scratch, scratch.memory.data(), config, max_rows);
  return scratch;
}

}  // namespace edge
