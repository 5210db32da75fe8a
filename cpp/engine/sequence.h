// One text in the making: its tokens, its keys and values, and the logits of its last token.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/ffn_capture.h"
#include "sample/sampler.h"
#include "speculate/verify.h"

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
  // advance(), and what each feed-forward layer saw meanwhile; returns how many rows that were. kBadArgument where a layer
  // is a mixture or its neurons are guessed.
  Result<int64_t> capture(const FfnCapture& into);
  // The logits after the last token; computes what is pending.
  Result<std::vector<float>> logits();
  // Log-probabilities of tokens[1..] given those before each; replaces the text.
  Result<std::vector<double>> score(std::vector<int32_t> tokens);
  // Forgets what follows the first n_tokens.
  Status truncate(int64_t n_tokens);
  // One pass over the last token and guesses of what follows it (n_pending() must be 1); appends what it draws.
  Result<Verified> verify(const DraftTree& tree, Acceptor& acceptor, const VerifyLimits& limits, bool wants_best);
  // Another text that begins as the first n_tokens of this one and shares their keys and values (KvCache::share). The
  // budget is asked for its logits only when it is advanced by itself.
  Result<std::unique_ptr<Sequence>> fork(int64_t n_tokens);
  Engine& engine() const { return engine_; }
  // A text, what draws its tokens, and how many it may get at once.
  struct Lane {
    Sequence* text = nullptr;
    Sampler* sampler = nullptr;
    int64_t max_tokens = 1;
  };
  // One forward pass over pending tokens of several texts of one engine, at most max_rows together and at least one of
  // each. Texts that nothing is pending of afterwards are drawn a token, which is appended: as next() would, to the bit.
  // On error all texts are as before.
  static Result<std::vector<std::optional<SampledToken>>> step(Engine& engine, std::span<const Lane> lanes);
  // step() again and again, until `ms` have passed or no text may get more: what each was drawn. A text ends with one of
  // `ends`, or with its max_tokens. At least one step. After an error texts hold what they were drawn until then.
  static Result<std::vector<std::vector<SampledToken>>> run(Engine& engine, std::span<const Lane> lanes, double ms,
                                                            std::span<const int32_t> ends);
  // For tests and benchmarks, which put keys and values there that no text gave.
  KvCache& kv() { return kv_; }
  // Changes when the text does other than at its end; no two sequences ever have the same.
  uint64_t revision() const { return revision_; }
  // From now on hidden() is the final-normed hidden state [hidden_size] of the last token computed, which the newest
  // token was drawn from; empty while there is none.
  void keep_hidden() { keeps_hidden_ = true; }
  std::span<const float> hidden() const { return hidden_; }
  // Drops the oldest tokens so that `keep_first` and then the latest `keep_last` remain; they are computed again.
  Status shift(int64_t keep_first, int64_t keep_last);

  // Text, keys and values to and from a file (kv/kv_session.h). What load() replaces is gone even when it fails.
  Status save(const std::string& path);
  Status load(const std::string& path);

 private:
  explicit Sequence(Engine& engine) : engine_(engine), kv_(engine.kv_pool()) {}
  using OnRow = std::function<Status(int64_t token_index, std::span<float> logits)>;
  Status pass(bool every_row, const OnRow& on_row);
  Status remember_hidden(int32_t row);
  Status reserve_logits();
  void forget_pass();

  Engine& engine_;
  KvCache kv_;
  std::vector<int32_t> tokens_;
  Block logits_;
  bool has_logits_ = false;
  bool keeps_hidden_ = false;
  std::vector<float> hidden_;
  uint64_t revision_ = 0;
};

}  // namespace edge
