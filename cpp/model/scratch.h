// Activations of one pass, carved out of a single budgeted block; the same list gives the sizes before anything is loaded.
#pragma once

#include <cstdint>
#include <span>

#include "core/budget.h"
#include "core/status.h"
#include "model/decoder_config.h"

namespace edge {

inline int64_t pad32(int64_t n) { return (n + 31) / 32 * 32; }

struct Scratch {
  // [max_rows][...] each; widths of products are padded to 16 because kernels write whole tiles.
  float* hidden = nullptr;       // [hidden_size], the residual stream
  float* normed = nullptr;       // [hidden_size]
  float* q = nullptr;            // [q_dim]
  float* k = nullptr;            // [kv_dim]
  float* v = nullptr;            // [kv_dim]
  float* attended = nullptr;     // [q_dim]
  float* projected = nullptr;    // [hidden_size], an output on its way into the residual
  float* gate = nullptr;         // [ffn_dim]
  float* up = nullptr;           // [ffn_dim]
  float* router = nullptr;       // [n_experts]
  float* expert_in = nullptr;    // [hidden_size], rows gathered for one expert
  float* expert_out = nullptr;   // [hidden_size]
  // Of feed-forward layers that come by neuron, [kNeuronRows][...] or one entry per neuron:
  std::byte* neuron_acts = nullptr;  // activations in the order of neuron rows, at most 4 bytes a value
  float* neuron_out = nullptr;       // [hidden_size padded to 32]
  uint64_t* neuron_rows = nullptr;   // [ffn_dim], which rows use a neuron; or [ffn_dim / 64], which neurons a row uses
  const std::byte** records = nullptr;  // [ffn_dim]
  int32_t* neurons = nullptr;           // [ffn_dim], those that some row uses
  int32_t* expected = nullptr;          // [ffn_dim], those that the next layer will probably use
  bool* computed = nullptr;             // [ffn_dim]
  uint8_t* score_bin = nullptr;         // [ffn_dim], of the highest score that a predictor gave for a row
  uint8_t* score_row = nullptr;         // [ffn_dim], the row
  float* cos = nullptr;          // [n_rotary / 2]
  float* sin = nullptr;
  float* logits = nullptr;       // [kLogitRows][vocab_size]
  std::span<std::byte> acts;     // quantised rows
  Block memory;

  static constexpr int64_t kLogitRows = 8;
  static constexpr int64_t kNeuronRows = 64;  // a bit for each

  static uint64_t bytes(const DecoderConfig& config, int64_t max_rows);
  static Result<Scratch> create(const DecoderConfig& config, int64_t max_rows, Budget& budget);
};

}  // namespace edge
