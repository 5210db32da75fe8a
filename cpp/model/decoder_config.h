// What a family is to the core: numbers and flags, decided when the model was packed (flashload/arch).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "kernels/kv_tile.h"

namespace edge {

enum class Norm { kRms, kLayer };
enum class Activation { kSilu, kRelu, kGelu, kGeluTanh };
enum class QkNorm { kNone, kHead, kFull };

struct DecoderConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t n_layers = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  Norm norm = Norm::kRms;
  float norm_eps = 1e-5f;
  Activation activation = Activation::kSilu;
  bool gated = true;
  std::vector<float> rope_inv_freq;  // [n_rotary / 2]; empty: no rotation
  float rope_magnitude = 1.0f;
  int64_t position_offset = -1;      // learned positions start here; -1: none
  std::vector<int64_t> windows;      // per layer; 0: sees everything
  QkNorm qk_norm = QkNorm::kNone;
  float clip_qkv = 0.0f;             // 0: off
  int64_t n_experts = 0;
  int64_t experts_per_token = 0;
  int64_t expert_intermediate_size = 0;
  bool norm_topk_prob = false;
  bool tied_head = false;
  bool by_neuron = false;            // some feed-forward layers are records of neurons: room to work on them
  KvType kv_type = KvType::kF16;     // of cached keys and values
  float attention_scale = 0.0f;
  float logit_scale = 1.0f;

  // The first position that a row at `position` sees: a window of w sees the w latest, its own included.
  int64_t first_visible(int64_t layer, int64_t position) const {
    const int64_t window = windows[static_cast<size_t>(layer)];
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
  int64_t q_dim() const { return n_heads * head_dim; }
  int64_t kv_dim() const { return n_kv_heads * head_dim; }
  int64_t ffn_dim() const { return intermediate_size > expert_intermediate_size ? intermediate_size : expert_intermediate_size; }

  // Every relation the decoder relies on; kBadFile names the key, what was expected and what was found.
  Status validate() const;
};

}  // namespace edge
