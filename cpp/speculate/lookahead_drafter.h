// Lookahead decoding (Fu et al. 2024, arXiv 2402.02057): drafts without another model. Each pass carries a window of
// guesses for the places ahead, W columns wide and N - 1 levels deep, and every pass replaces a level by what the
// target says (Jacobi iteration). Down each column runs an n-gram that the target itself found likely; n-grams that
// begin with the newest token are the drafts. The window costs W (N - 1) rows a pass, so it pays where rows are
// nearly free: weights that stream.
#pragma once

#include <vector>

#include "speculate/drafter.h"

namespace edge {

class LookaheadDrafter final : public Drafter {
 public:
  // window: columns; n: tokens of an n-gram; n_grams: those remembered for one first token.
  LookaheadDrafter(int64_t window, int64_t n, int64_t n_grams);

  const char* name() const override { return "lookahead"; }
  void restart() override;
  Status propose(const DraftContext& context, DraftTree& tree) override;
  void observe(const VerifiedPass& pass) override;
  uint8_t n_sources() const override { return 2; }  // n-grams, and the window itself
  double prior(int i) const override { return i == 0 ? 0.4 : 0.05; }
  Sources chain_sources(int64_t) const override { return {first_source(), 1}; }
  bool wants_best() const override { return true; }
  bool costs_by_depth() const override { return false; }
  int64_t rider_rows() const override { return window_ * (n_ - 1); }
  int64_t probe_steps() const override { return 16; }

 private:
  static constexpr size_t kBuckets = 512;

  // n-grams that begin with `first`, the latest in front; the next first token that hashes alike takes the place.
  struct Bucket {
    int32_t first = -1;
    std::vector<int32_t> tails;  // [n_grams][n - 1]
  };

  void fill(std::span<const int32_t> text);
  void remember(int32_t first, std::span<const int32_t> tail);
  Bucket& bucket(int32_t first) { return buckets_[static_cast<uint32_t>(first) * 0x9E3779B1u % kBuckets]; }

  int64_t window_, n_, n_grams_;
  std::vector<int32_t> levels_;  // [n - 1][window], level 0 nearest to the text; empty before the first pass
  std::vector<int32_t> nodes_;   // [n - 1][window] of the tree in flight; empty when the window had no room
  std::vector<Bucket> buckets_;
};

}  // namespace edge
