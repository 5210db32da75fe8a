// One text in the making: its tokens, its keys and values, and the logits of its last token.
#pragma once

#include <memory>
#include <vector>

#include "engine/engine.h"
#include "sample/sampler.h"

namespace edge {

class Sequence {
 public:
  // The engine must outlive the sequence.
  static Result<std::unique_ptr<Sequence>> create(Engine& engine);

  // Replaces the text; the longest prefix already computed is kept. Returns how many tokens were kept.
  // kContextOverflow names both numbers.
  Result<int64_t> set_tokens(std::vector<int32_t> tokens);
  const std::vector<int32_t>& tokens() const { return tokens_; }
  int64_t n_pending() const { return static_cast<int64_t>(tokens_.size()) - kv_.n_committed(); }

  // One forward pass over at most max_rows pending tokens.
  Status advance();
  // Computes what is pending, draws the next token and appends it.
  Result<SampledToken> next(Sampler& sampler);
  // The logits after the last token; computes what is pending.
  Result<std::vector<float>> logits();
  // Log-probabilities of tokens[1..] given those before each; replaces the text.
  Result<std::vector<double>> score(std::vector<int32_t> tokens);
  // Drops the oldest tokens so that `keep_first` and then the latest `keep_last` remain; they are computed again.
  Status shift(int64_t keep_first, int64_t keep_last);

 private:
  explicit Sequence(Engine& engine) : engine_(engine), kv_(engine.kv_pool()) {}
  using OnRow = std::function<Status(int64_t token_index, std::span<float> logits)>;
  Status pass(bool every_row, const OnRow& on_row);

  Engine& engine_;
  KvCache kv_;
  std::vector<int32_t> tokens_;
  Block logits_;
  bool has_logits_ = false;
};

}  // namespace edge
