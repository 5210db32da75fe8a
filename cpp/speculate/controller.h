// Decides what is worth verifying. It knows what a pass over m rows costs here and now, how often guesses of each kind
// are accepted at each depth, and keeps an account of what speculation has won and lost, which ends a losing streak
// whatever the estimates say.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "speculate/draft_tree.h"
#include "speculate/steady.h"

namespace edge {

// Milliseconds of a pass over m rows: measured where it was, in between by straight lines.
class PassCost {
 public:
  static constexpr int64_t kMaxRows = 128;

  // What a further row costs, as a share of the first, until it was measured: weights that stream cost the same for any
  // number of rows.
  void set_row_prior(double share) { row_prior_ = share; }
  void record(int64_t rows, double ms);
  bool known() const { return ms_[1].known(); }
  double operator()(int64_t rows) const { return curve_[static_cast<size_t>(std::clamp<int64_t>(rows, 1, kMaxRows))]; }

 private:
  double row_prior_ = 0.15;
  std::array<double, kMaxRows + 1> curve_{};  // of all rows: never falling
  std::array<Steady, kMaxRows + 1> ms_{};
};

// How often guesses are accepted, by source and depth; the past fades.
class Acceptance {
 public:
  static constexpr int64_t kMaxDepth = 16;
  static constexpr int kMaxSources = 128;

  void set_prior(uint8_t source, double rate) {
    if (source < kMaxSources) prior_[source] = rate;
  }
  void record(uint8_t source, int64_t depth, bool accepted);
  // Makes room for news of a source that was off.
  void fade(uint8_t source);
  // Of a guess whose parent was accepted.
  double rate(uint8_t source, int64_t depth) const;
  // Over several sources, as often as each is met.
  double rate(uint8_t source, int n_sources, int64_t depth) const;

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

  // Whether the account allows `ms` that may not pay, and passes that may not.
  bool may_spend(double ms) const;
  // The depth to which a chain of guesses pays best, and the tokens a millisecond it then promises; depth 0: none does.
  struct Chain {
    int64_t depth = 0;
    double rate = 0;
  };
  // rates[k]: how often the k-th guess is accepted where the one before was; the drafter takes ms_fixed and, for each
  // guess, ms_per_depth.
  Chain chain(std::span<const double> rates, double ms_fixed, double ms_per_depth) const;
  // Tokens a millisecond that the best part of a tree promises.
  double rate(const DraftTree& tree) const { return weigh(tree).rate; }
  // Below which probability of being reached a guess is not worth a row of a pass over so many guesses and draft_ms,
  // where a millisecond is worth `rate` tokens.
  double least_reach(int64_t n_guesses, double draft_ms, double rate) const {
    return rate * ((cost(1 + n_guesses) - cost(1)) / static_cast<double>(n_guesses) + draft_ms);
  }
  // Cuts the tree to the nodes that pay: the root alone when none do. Now and then it lets guesses pass that do not
  // seem to: what a pass costs may have been measured in a bad moment.
  void prune(DraftTree& tree);
  // What a pass that verified drafts gave, draft time included; likely_ms of it are its own doing.
  void account(int64_t n_tokens, double ms, double likely_ms);
  // The same where guesses were asked for whatever they cost: it counts, but is held against no others.
  void note(int64_t n_tokens, double ms) {
    saved_ms_ += static_cast<double>(n_tokens) * cost(1) - ms;
    total_ms_ += ms;
  }
  // Time spent on a promise of more than itself: it counts, but does not end a streak.
  void invest(double ms) { note(0, ms); }
  // Time that plain passes took: what a loss is measured against.
  void account_plain(double ms) { total_ms_ += ms; }
  // Judges what was proposed, verified or not, by the tokens that followed the root.
  void learn(const DraftTree& proposed, std::span<const int32_t> tokens);

  // Another text: what speculation won on earlier ones is no reason to lose time on this one. Losses stay.
  void begin_text();

  double saved_ms() const { return saved_ms_; }
  void forget_account() { balance_ms_ = saved_ms_ = total_ms_ = 0; }

 private:
  static constexpr int64_t kRetry = 32;

  // The nodes that are not pinned by falling probability of being reached, and how many of them pay.
  struct Weighed {
    std::vector<int32_t> order;
    std::vector<double> reach;  // by node
    size_t n_kept = 0;
    double rate = 0;
  };
  Weighed weigh(const DraftTree& tree) const;

  int64_t refused_ = 0;  // trees in a row
  int64_t retry_after_ = kRetry;
  double balance_ms_ = 0;  // bounded above, so that a streak of wins cannot pay for a long one of losses
  double saved_ms_ = 0;
  double total_ms_ = 0;  // of this text
};

}  // namespace edge
