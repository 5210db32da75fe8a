// Names to weight ids, with every shape proven against the config before the first token.
#pragma once

#include <vector>

#include "core/status.h"
#include "format/pack_directory.h"
#include "model/decoder_config.h"

namespace edge {

struct ExpertWeights {
  WeightId gate = kNoWeight, up = kNoWeight, down = kNoWeight;
};

struct LayerWeights {
  int64_t index = -1;  // of the layer; -1 of one expert taken as a layer
  WeightId attn_norm = kNoWeight, attn_norm_bias = kNoWeight;
  WeightId q = kNoWeight, k = kNoWeight, v = kNoWeight, o = kNoWeight;
  WeightId q_bias = kNoWeight, k_bias = kNoWeight, v_bias = kNoWeight, o_bias = kNoWeight;
  WeightId q_norm = kNoWeight, k_norm = kNoWeight;
  WeightId ffn_norm = kNoWeight, ffn_norm_bias = kNoWeight;
  WeightId gate = kNoWeight, up = kNoWeight, down = kNoWeight;
  WeightId gate_bias = kNoWeight, up_bias = kNoWeight, down_bias = kNoWeight;
  // A feed-forward layer by neuron, in place of gate, up and down: records of gate row (where gated), up row and down
  // column; the rows that decide who is active (gate, or up where there is no gate) once more by themselves; and a
  // low-rank guess at the same, which a pack may lack.
  WeightId neuron_records = kNoWeight, neuron_gates = kNoWeight;
  WeightId predictor_down = kNoWeight, predictor_up = kNoWeight, predictor_bias = kNoWeight;
  WeightId router = kNoWeight;
  std::vector<ExpertWeights> experts;  // empty: a dense layer
};

struct ModelWeights {
  WeightId embed = kNoWeight;
  WeightId embed_position = kNoWeight;
  WeightId final_norm = kNoWeight, final_norm_bias = kNoWeight;
  WeightId head = kNoWeight;  // the embedding when tied
  std::vector<LayerWeights> layers;

  // kBadFile names the missing weight, or the shape expected and the one found.
  static Result<ModelWeights> resolve(const DecoderConfig& config, const PackDirectory& directory);
};

}  // namespace edge
