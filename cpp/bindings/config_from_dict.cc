#include "bindings/config_from_dict.h"

#include "bindings/binding.h"

namespace py = pybind11;

namespace edge {
namespace {

template <typename T>
T pick(const py::dict& dict, const char* key, std::initializer_list<std::pair<const char*, T>> choices) {
  const std::string found = dict[key].cast<std::string>();
  std::string expected;
  for (const auto& [name, choice] : choices) {
    if (found == name) return choice;
    expected += (expected.empty() ? "" : ", ") + std::string(name);
  }
  raise(error(Code::kBadFile, "config: %s: expected one of %s, found %s", key, expected.c_str(), found.c_str()));
}

}  // namespace

DecoderConfig decoder_config_from(const py::dict& dict) {
  DecoderConfig config;
  config.vocab_size = dict["vocab_size"].cast<int64_t>();
  config.hidden_size = dict["hidden_size"].cast<int64_t>();
  config.n_layers = dict["n_layers"].cast<int64_t>();
  config.n_heads = dict["n_heads"].cast<int64_t>();
  config.n_kv_heads = dict["n_kv_heads"].cast<int64_t>();
  config.head_dim = dict["head_dim"].cast<int64_t>();
  config.intermediate_size = dict["intermediate_size"].cast<int64_t>();
  config.norm = pick<Norm>(dict, "norm", {{"rms", Norm::kRms}, {"layer", Norm::kLayer}});
  config.norm_eps = dict["norm_eps"].cast<float>();
  config.activation = pick<Activation>(dict, "activation",
                                       {{"silu", Activation::kSilu},
                                        {"relu", Activation::kRelu},
                                        {"gelu", Activation::kGelu},
                                        {"gelu_tanh", Activation::kGeluTanh}});
  config.gated = dict["gated"].cast<bool>();
  config.rope_inv_freq = dict["rope_inv_freq"].cast<std::vector<float>>();
  config.rope_magnitude = dict["rope_magnitude"].cast<float>();
  config.position_offset = dict["position_offset"].cast<int64_t>();
  config.windows = dict["windows"].cast<std::vector<int64_t>>();
  config.qk_norm =
      pick<QkNorm>(dict, "qk_norm", {{"none", QkNorm::kNone}, {"head", QkNorm::kHead}, {"full", QkNorm::kFull}});
  config.clip_qkv = dict["clip_qkv"].cast<float>();
  config.n_experts = dict["n_experts"].cast<int64_t>();
  config.experts_per_token = dict["experts_per_token"].cast<int64_t>();
  config.expert_intermediate_size = dict["expert_intermediate_size"].cast<int64_t>();
  config.norm_topk_prob = dict["norm_topk_prob"].cast<bool>();
  config.tied_head = dict["tied_head"].cast<bool>();
  config.attention_scale = dict["attention_scale"].cast<float>();
  config.logit_scale = dict["logit_scale"].cast<float>();
  if (dict.contains("by_neuron")) config.by_neuron = dict["by_neuron"].cast<bool>();
  if (dict.contains("kv_type")) {
    config.kv_type =
        pick<KvType>(dict, "kv_type", {{"f16", KvType::kF16}, {"int8", KvType::kInt8}, {"int4", KvType::kInt4}});
  }
  return config;
}

}  // namespace edge
