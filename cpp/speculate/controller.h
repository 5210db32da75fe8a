// Decides what is worth verifying. It knows what a pass over m rows costs here and now, how often guesses of each kind
// are accepted at each depth, and keeps an account of what speculation has won and lost, which ends a losing streak
// whatever the estimates say.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "speculate/draft_tree.h"

namespace edge {

// Milliseconds of a pass over m rows: measured where it was, in between by straight lines.
class PassCost {
 public:
  static constexpr int64_t kMaxRows = 128;

  void record(int64_t rows, double ms);
  bool known() const { return ms_[1] > 0; }
  double operator()(int64_t rows) const;

 private:
  std::array<double, kMaxRows + 1> ms_{};  // 0: not measured
};

// How often guesses are accepted, by source and depth; the past fades.
class Acceptance {
 public:
  static constexpr int64_t kMaxDepth = 16;
  static constexpr int kMaxSources = 64;

  void set_prior(uint8_t source, double rate) { prior_[source] = rate; }
  void record(uint8_t source, int64_t depth, bool accepted);
  // Makes room for news of a source that was off.
  void fade(uint8_t source);
  // Of a guess whose parent was accepted.
  double rate(uint8_t source, int64_t depth) const;

 private:
  struct Count {
    double tried = 0;
    double accepted = 0;
  };
  std::array<std::array<Count, kMaxDepth>, kMaxSources> counts_{};
  std::array<double, kMaxSources> prior_{};
};

class Controller {
 public:
  PassCost cost;
  Acceptance acceptance;

  // Whether the account allows passes that may not pay.
  bool may_spend() const;
  // How deep a chain of guesses from `source` pays when each takes draft_ms of the drafter's time; 0: none does.
  int64_t chain_depth(uint8_t source, double draft_ms, int64_t max_depth) const;
  // Cuts the tree to the nodes that pay: the root alone when none do.
  void prune(DraftTree& tree) const;
  // What a pass that verified drafts gave, draft time included.
  void account(int64_t n_tokens, double ms);
  // Time that plain passes took: what a loss is measured against.
  void account_plain(double ms) { total_ms_ += ms; }
  // Judges what was proposed, verified or not, by the tokens that followed the root.
  void learn(const DraftTree& proposed, std::span<const int32_t> tokens);

  double saved_ms() const { return saved_ms_; }

 private:
  double balance_ms_ = 0;  // bounded above, so that a streak of wins cannot pay for a long one of losses
  double saved_ms_ = 0;
  double total_ms_ = 0;
};

}  // namespace edge
