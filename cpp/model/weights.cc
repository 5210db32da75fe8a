#include "model/weights.h"

#include <string>

namespace edge {
namespace {

class Resolver {
 public:
  explicit Resolver(const PackDirectory& directory) : directory_(directory) {}

  // The first problem met; later look-ups go on so that the code below reads as a list.
  Status status;

  WeightId matrix(const std::string& name, int64_t rows, int64_t cols) { return find(name, rows, cols, true, true); }
  WeightId vector(const std::string& name, int64_t size) { return find(name, 1, size, false, true); }
  WeightId optional_vector(const std::string& name, int64_t size) { return find(name, 1, size, false, false); }
  bool has(const std::string& name) const { return directory_.find(name) != kNoWeight; }
  // Records of `parts` rows each.
  WeightId neurons(const std::string& name, int64_t rows, int64_t cols, int64_t parts) {
    const WeightId id = directory_.find(name);
    if (id == kNoWeight) {
      if (status.ok()) status = error(Code::kBadFile, "pack: weight %s is missing", name.c_str());
      return id;
    }
    const PackEntry& entry = directory_.entry(id);
    const bool right_kind = is_neuron_format(entry.format);
    if (status.ok() && (!right_kind || entry.rows != rows || entry.cols != cols || entry.neuron_parts() != parts)) {
      status = error(Code::kBadFile, "pack: %s: expected %lld neurons of %lld rows of %lld values, found %lld of %lld x "
                     "%lld in format %u", name.c_str(), static_cast<long long>(rows), static_cast<long long>(parts),
                     static_cast<long long>(cols), static_cast<long long>(entry.rows),
                     static_cast<long long>(right_kind ? entry.neuron_parts() : 0),
                     static_cast<long long>(entry.cols), static_cast<unsigned>(entry.format));
    }
    return id;
  }
  // 0 when absent.
  int64_t rows_of(const std::string& name) const {
    const WeightId id = directory_.find(name);
    return id == kNoWeight ? 0 : directory_.entry(id).rows;
  }

 private:
  WeightId find(const std::string& name, int64_t rows, int64_t cols, bool matrix, bool required) {
    const WeightId id = directory_.find(name);
    if (id == kNoWeight) {
      if (required && status.ok()) status = error(Code::kBadFile, "pack: weight %s is missing", name.c_str());
      return id;
    }
    const PackEntry& entry = directory_.entry(id);
    const bool right_kind = matrix ? is_tile_format(entry.format) : entry.format == WeightFormat::kF32Vector;
    if (status.ok() && (!right_kind || entry.rows != rows || entry.cols != cols)) {
      status = error(Code::kBadFile, "pack: %s: expected a %s of %lld x %lld, found %lld x %lld in format %u", name.c_str(),
                     matrix ? "matrix" : "vector", static_cast<long long>(rows), static_cast<long long>(cols),
                     static_cast<long long>(entry.rows), static_cast<long long>(entry.cols),
                     static_cast<unsigned>(entry.format));
    }
    return id;
  }

  const PackDirectory& directory_;
};

void resolve_neurons(Resolver& find, const DecoderConfig& config, const std::string& prefix, LayerWeights* layer) {
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  layer->neuron_records = find.neurons(prefix + "neurons.records", inner, hidden, config.gated ? 3 : 2);
  layer->neuron_gates = find.neurons(prefix + "neurons.gates", inner, hidden, 1);
  if (!find.has(prefix + "predictor.up.weight")) return;
  if (config.activation != Activation::kRelu && find.status.ok()) {
    find.status = error(Code::kBadFile, "pack: %spredictor.up.weight: expected relu, which leaves neurons at zero, found "
                        "another activation", prefix.c_str());
  }
  const int64_t rank = find.rows_of(prefix + "predictor.down.weight");
  if (rank > inner && find.status.ok()) {
    find.status = error(Code::kBadFile, "pack: %spredictor.down.weight: expected a rank of at most %lld, found %lld",
                        prefix.c_str(), static_cast<long long>(inner), static_cast<long long>(rank));
  }
  layer->predictor_down = find.matrix(prefix + "predictor.down.weight", rank, hidden);
  layer->predictor_up = find.matrix(prefix + "predictor.up.weight", inner, rank);
  layer->predictor_bias = find.vector(prefix + "predictor.bias", inner);
}

LayerWeights resolve_layer(Resolver& find, const DecoderConfig& config, int64_t index) {
  const std::string prefix = "layers." + std::to_string(index) + ".";
  const int64_t hidden = config.hidden_size, q_dim = config.q_dim(), kv_dim = config.kv_dim();
  LayerWeights layer;
  layer.index = index;
  layer.attn_norm = find.vector(prefix + "attn_norm.weight", hidden);
  layer.attn_norm_bias = find.optional_vector(prefix + "attn_norm.bias", hidden);
  layer.q = find.matrix(prefix + "q.weight", q_dim, hidden);
  layer.k = find.matrix(prefix + "k.weight", kv_dim, hidden);
  layer.v = find.matrix(prefix + "v.weight", kv_dim, hidden);
  layer.o = find.matrix(prefix + "o.weight", hidden, q_dim);
  layer.q_bias = find.optional_vector(prefix + "q.bias", q_dim);
  layer.k_bias = find.optional_vector(prefix + "k.bias", kv_dim);
  layer.v_bias = find.optional_vector(prefix + "v.bias", kv_dim);
  layer.o_bias = find.optional_vector(prefix + "o.bias", hidden);
  if (config.qk_norm != QkNorm::kNone) {
    const bool full = config.qk_norm == QkNorm::kFull;
    layer.q_norm = find.vector(prefix + "q_norm.weight", full ? q_dim : config.head_dim);
    layer.k_norm = find.vector(prefix + "k_norm.weight", full ? kv_dim : config.head_dim);
  }
  layer.ffn_norm = find.vector(prefix + "ffn_norm.weight", hidden);
  layer.ffn_norm_bias = find.optional_vector(prefix + "ffn_norm.bias", hidden);

  // A mixture model may hold dense layers too: the router's presence tells them apart.
  if (config.n_experts > 0 && find.has(prefix + "router.weight")) {
    const int64_t inner = config.expert_intermediate_size;
    layer.router = find.matrix(prefix + "router.weight", config.n_experts, hidden);
    for (int64_t e = 0; e < config.n_experts; ++e) {
      const std::string expert = prefix + "experts." + std::to_string(e) + ".";
      layer.experts.push_back({find.matrix(expert + "gate.weight", inner, hidden),
                               find.matrix(expert + "up.weight", inner, hidden),
                               find.matrix(expert + "down.weight", hidden, inner)});
    }
    return layer;
  }
  const int64_t inner = config.intermediate_size;
  if (find.has(prefix + "neurons.records")) {
    resolve_neurons(find, config, prefix, &layer);
  } else {
    if (config.gated) layer.gate = find.matrix(prefix + "gate.weight", inner, hidden);
    layer.up = find.matrix(prefix + "up.weight", inner, hidden);
    layer.down = find.matrix(prefix + "down.weight", hidden, inner);
  }
  layer.gate_bias = find.optional_vector(prefix + "gate.bias", inner);
  layer.up_bias = find.optional_vector(prefix + "up.bias", inner);
  layer.down_bias = find.optional_vector(prefix + "down.bias", hidden);
  return layer;
}

}  // namespace

Result<ModelWeights> ModelWeights::resolve(const DecoderConfig& config, const PackDirectory& directory) {
  Resolver find(directory);
  ModelWeights weights;
  weights.embed = find.matrix("embed.weight", config.vocab_size, config.hidden_size);
  if (config.position_offset >= 0) {
    weights.embed_position = directory.find("embed.position");
    if (weights.embed_position == kNoWeight) return error(Code::kBadFile, "pack: weight embed.position is missing");
    const PackEntry& entry = directory.entry(weights.embed_position);
    if (!is_tile_format(entry.format) || entry.cols != config.hidden_size || entry.rows <= config.position_offset) {
      return error(Code::kBadFile, "pack: embed.position: expected a matrix of more than %lld x %lld, found %lld x %lld",
                   static_cast<long long>(config.position_offset), static_cast<long long>(config.hidden_size),
                   static_cast<long long>(entry.rows), static_cast<long long>(entry.cols));
    }
  }
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    weights.layers.push_back(resolve_layer(find, config, layer));
  }
  weights.final_norm = find.vector("final_norm.weight", config.hidden_size);
  weights.final_norm_bias = find.optional_vector("final_norm.bias", config.hidden_size);
  weights.head = config.tied_head ? weights.embed
                                  : find.matrix("head.weight", config.vocab_size, config.hidden_size);
  if (!find.status.ok()) return find.status;
  return weights;
}

}  // namespace edge
