#include "model/decoder_config.h"

#include <cmath>

namespace edge {
namespace {

Status in_range(const char* key, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return {};
  return error(Code::kBadFile, "config: %s: expected %lld..%lld, found %lld", key, static_cast<long long>(low),
               static_cast<long long>(high), static_cast<long long>(value));
}

Status finite(const char* key, double value) {
  if (std::isfinite(value)) return {};
  return error(Code::kBadFile, "config: %s: expected a finite number, found %g", key, value);
}

}  // namespace

Status DecoderConfig::validate() const {
  EDGE_TRY(in_range("vocab_size", vocab_size, 1, 1 << 24));
  EDGE_TRY(in_range("hidden_size", hidden_size, 1, 1 << 20));
  EDGE_TRY(in_range("n_layers", n_layers, 1, 4096));
  EDGE_TRY(in_range("n_heads", n_heads, 1, 4096));
  EDGE_TRY(in_range("n_kv_heads", n_kv_heads, 1, n_heads));
  EDGE_TRY(in_range("head_dim", head_dim, 1, 4096));
  EDGE_TRY(in_range("intermediate_size", intermediate_size, n_experts > 0 ? 0 : 1, 1 << 22));
  EDGE_TRY(in_range("n_experts", n_experts, 0, 4096));
  if (n_heads % n_kv_heads != 0) {
    return error(Code::kBadFile, "config: n_heads: expected a multiple of n_kv_heads %lld, found %lld",
                 static_cast<long long>(n_kv_heads), static_cast<long long>(n_heads));
  }
  if (n_experts > 0) {
    EDGE_TRY(in_range("experts_per_token", experts_per_token, 1, n_experts));
    EDGE_TRY(in_range("expert_intermediate_size", expert_intermediate_size, 1, 1 << 22));
  }
  EDGE_TRY(in_range("rope_inv_freq length", static_cast<int64_t>(rope_inv_freq.size()), 0, head_dim / 2));
  for (float frequency : rope_inv_freq) EDGE_TRY(finite("rope_inv_freq", frequency));
  EDGE_TRY(in_range("windows length", static_cast<int64_t>(windows.size()), n_layers, n_layers));
  for (int64_t window : windows) EDGE_TRY(in_range("windows", window, 0, int64_t{1} << 40));
  EDGE_TRY(in_range("position_offset", position_offset, -1, 1024));
  EDGE_TRY(finite("norm_eps", norm_eps));
  EDGE_TRY(finite("rope_magnitude", rope_magnitude));
  EDGE_TRY(finite("clip_qkv", clip_qkv));
  EDGE_TRY(finite("attention_scale", attention_scale));
  EDGE_TRY(finite("logit_scale", logit_scale));
  return {};
}

}  // namespace edge
