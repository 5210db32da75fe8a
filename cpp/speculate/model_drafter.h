// Drafts with a smaller model of the same vocabulary (Leviathan et al. 2023). It draws with the request's own sampler
// and noise, so where the two models' distributions are close, so are their tokens. Or with a copy of the target at fewer
// bits, which is right more often.
#pragma once

#include <memory>
#include <vector>

#include "core/budget.h"
#include "kv/kv_cache.h"
#include "model/decoder.h"
#include "speculate/drafter.h"

namespace edge {

class ModelDrafter final : public Drafter {
 public:
  // The draft model's parts must outlive the drafter. vocab_size: the target's; `context` tokens fit the draft's cache.
  static Result<std::unique_ptr<ModelDrafter>> create(Decoder& decoder, KvPool& pool, int64_t context,
                                                      int32_t vocab_size, bool is_copy, Budget& budget);

  const char* name() const override { return is_copy_ ? "self" : "draft"; }
  void restart() override { n_agreed_ = 0; }
  Status propose(const DraftContext& context, DraftTree& tree) override;
  uint8_t n_sources() const override { return 2 * kLevels; }
  double prior(int i) const override;
  Sources chain_sources(int64_t) const override { return {first_source(), kLevels}; }
  int64_t lag(std::span<const int32_t> text) const override;
  Status read(const DraftContext& context) override;

 private:
  static constexpr int kLevels = 6;  // by the draft's own probability of its guess; then the same for second guesses

  ModelDrafter(Decoder& decoder, KvPool& pool, int64_t context, int32_t vocab_size, bool is_copy)
      : decoder_(decoder), kv_(pool), context_(context), vocab_size_(vocab_size), is_copy_(is_copy) {}

  // Where the next guesses hang, how deep they are, and how probably the text gets there. The text up to the node is
  // tokens_.
  struct Place {
    int32_t node;
    int64_t depth;
    double reach;
  };

  uint8_t source_of(double probability, bool second) const;
  void hold(std::span<float> logits);
  Status pass(std::span<const int32_t> tokens, bool wants_logits);
  Status catch_up(std::span<const int32_t> text, bool wants_logits);
  bool second_pays(const DraftContext& context, int64_t depth, double reach) const;
  Status add_sampled(const DraftContext& context, const Place& at, DraftTree& tree, int32_t* next);
  Status add_drawn(const DraftContext& context, const Place& at, DraftTree& tree, int32_t* next);

  Decoder& decoder_;
  KvCache kv_;
  int64_t context_;
  int32_t vocab_size_;
  bool is_copy_;
  SamplingConfig config_;  // of the request; sampler_ draws by it and reports nothing
  std::unique_ptr<Sampler> sampler_;
  std::vector<int32_t> tokens_;  // those with keys and values
  int64_t n_agreed_ = 0;         // of them known to be the text's
  std::vector<int32_t> parents_;  // [max_rows]: -1, 0, 1, ...
  std::vector<int32_t> known_;    // rows of the pass in flight
  std::span<float> logits_;       // [vocab_size] of the last pass: the decoder's own, or padded_
  Block padded_;  // [vocab_size], -inf where the draft's vocabulary ends; empty where it does not end before
};

}  // namespace edge
