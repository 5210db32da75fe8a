// Drafts with heads on the target's own hidden state (Medusa-1: Cai et al. 2024, arXiv 2401.10774). Head k turns the
// state h that the newest token was drawn from into h + silu(W_k h + b_k); the target's own output head then reads
// the token k + 1 places after the newest one from it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "core/budget.h"
#include "model/decoder.h"
#include "model/linear.h"
#include "speculate/drafter.h"

namespace edge {

class MedusaDrafter final : public Drafter {
 public:
  // Entries of a pack: medusa.{k}.weight [hidden][hidden] and medusa.{k}.bias [hidden], k from 0.
  static int64_t count(const PackDirectory& directory);
  // heads: a store that holds these entries. The references must outlive the drafter.
  // kUnsupported: the pack has none; kBadFile: they do not fit the model.
  static Result<std::unique_ptr<MedusaDrafter>> create(Decoder& decoder, const PackDirectory& directory,
                                                       std::unique_ptr<WeightStore> heads, const Kernels& kernels,
                                                       ThreadPool& pool, Budget& budget);

  const char* name() const override { return "medusa"; }
  void restart() override {}
  Status propose(const DraftContext& context, DraftTree& tree) override;
  uint8_t n_sources() const override { return static_cast<uint8_t>(heads_.size() * kRanks); }
  double prior(int i) const override;
  bool wants_hidden() const override { return true; }
  bool costs_by_depth() const override { return false; }
  Sources chain_sources(int64_t depth) const override {
    return {static_cast<uint8_t>(first_source() + std::min<int64_t>(depth - 1, heads_.size() - 1) * kRanks), 1};
  }

 private:
  static constexpr int64_t kMaxHeads = Decoder::kMaxProjected;
  static constexpr int kRanks = 4;  // guesses of one head, in the order the sampler would prefer them

  struct Head {
    WeightId weight, bias;
  };

  MedusaDrafter(Decoder& decoder, const PackDirectory& directory, std::unique_ptr<WeightStore> store,
                const Kernels& kernels, ThreadPool& pool)
      : decoder_(decoder), store_(std::move(store)), linear_(*store_, directory, kernels, pool) {}

  Status guess(const DraftContext& context, size_t n_heads);

  Decoder& decoder_;
  std::unique_ptr<WeightStore> store_;
  Linear linear_;
  std::vector<Head> heads_;
  Block memory_;
  float* input_ = nullptr;   // [pad16(hidden)]
  float* states_ = nullptr;  // [heads][pad16(hidden)], then [heads][hidden]
  std::unique_ptr<ActRows> acts_;
  std::vector<std::vector<int32_t>> tokens_;  // [heads][kRanks]
};

}  // namespace edge
