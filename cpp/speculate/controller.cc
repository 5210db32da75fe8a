#include "speculate/controller.h"

#include <algorithm>
#include <numeric>

namespace edge {
namespace {

constexpr double kDecay = 0.95;
constexpr double kPriorWeight = 3;
// A tree must promise this much more than it costs: estimates err.
constexpr double kWorthwhile = 1.05;
constexpr double kLossShare = 0.006;
constexpr double kLossPasses = 1;
constexpr double kWinPasses = 30;
constexpr int64_t kLongestRetry = 1024;

}  // namespace

void PassCost::record(int64_t rows, double ms) {
  if (rows < 1 || rows > kMaxRows || !(ms > 0)) return;
  ms_[static_cast<size_t>(rows)].record(ms);
  if (!this->known()) return;
  // More rows never take less time: what looks so was measured in a bad moment.
  const double one = ms_[1].ms();
  double least = 0;
  int64_t above = 0;  // the nearest measured rows above, at `least` ms
  for (int64_t m = kMaxRows; m >= 1; --m) {
    const double here = ms_[static_cast<size_t>(m)].ms();
    if (!(here > 0)) continue;
    least = above > 0 ? std::min(least, here) : here;
    const double slope = above > 0 ? (curve_[static_cast<size_t>(above)] - least) / static_cast<double>(above - m) : 0;
    for (int64_t k = m; k < (above > 0 ? above : kMaxRows + 1); ++k) {
      const double beyond = std::max(row_prior_ * one, m > 1 ? (least - one) / static_cast<double>(m - 1) : 0.0);
      curve_[static_cast<size_t>(k)] = least + (above > 0 ? slope : beyond) * static_cast<double>(k - m);
    }
    above = m;
  }
}

void Acceptance::record(uint8_t source, int64_t depth, bool accepted) {
  if (source >= kMaxSources || depth < 1) return;
  Count& count = counts_[source][static_cast<size_t>(std::min(depth, kMaxDepth) - 1)];
  count.tried = count.tried * kDecay + 1;
  count.accepted = count.accepted * kDecay + (accepted ? 1 : 0);
}

void Acceptance::fade(uint8_t source) {
  if (source >= kMaxSources) return;
  for (Count& count : counts_[source]) {
    count.tried /= 2;
    count.accepted /= 2;
  }
}

double Acceptance::rate(uint8_t source, int64_t depth) const { return rate(source, 1, depth); }

double Acceptance::rate(uint8_t source, int n_sources, int64_t depth) const {
  if (source >= kMaxSources || depth < 1) return 0;
  // Before any guess was met the middle source stands for all, and what is known of a depth for the next one.
  double rate = prior_[static_cast<size_t>(std::min(source + n_sources / 2, kMaxSources - 1))];
  for (size_t at = 0; at < static_cast<size_t>(std::min(depth, kMaxDepth)); ++at) {
    double tried = kPriorWeight, accepted = kPriorWeight * rate;
    for (int i = source; i < std::min(source + n_sources, kMaxSources); ++i) {
      tried += counts_[static_cast<size_t>(i)][at].tried;
      accepted += counts_[static_cast<size_t>(i)][at].accepted;
    }
    rate = accepted / tried;
  }
  return rate;
}

bool Controller::may_spend(double ms) const {
  return cost.known() && balance_ms_ - ms > -(kLossPasses * cost(1) + kLossShare * total_ms_);
}

Controller::Chain Controller::chain(std::span<const double> rates, double ms_fixed, double ms_per_depth) const {
  double reach = 1, tokens = 1;
  Chain best{0, kWorthwhile / cost(1)};
  for (int64_t depth = 1; depth <= static_cast<int64_t>(rates.size()); ++depth) {
    reach *= rates[static_cast<size_t>(depth) - 1];
    tokens += reach;
    const double rate = tokens / (cost(depth + 1) + ms_fixed + static_cast<double>(depth) * ms_per_depth);
    if (rate > best.rate) best = {depth, rate};
  }
  return best;
}

Controller::Weighed Controller::weigh(const DraftTree& tree) const {
  const size_t n = static_cast<size_t>(tree.size());
  Weighed weighed;
  weighed.reach.assign(n, 1);
  int64_t rows = 1;
  double tokens = 1;
  for (size_t i = 1; i < n; ++i) {
    const int32_t node = static_cast<int32_t>(i);
    weighed.reach[i] = weighed.reach[static_cast<size_t>(tree.parents()[i])] *
                       acceptance.rate(tree.source(node), tree.depth(node));
    if (tree.pinned(node)) {
      ++rows;
      tokens += weighed.reach[i];
    } else {
      weighed.order.push_back(node);
    }
  }
  // No node outranks its parent, and a stable sort leaves a parent before its equals.
  std::stable_sort(weighed.order.begin(), weighed.order.end(), [&](int32_t a, int32_t b) {
    return weighed.reach[static_cast<size_t>(a)] > weighed.reach[static_cast<size_t>(b)];
  });
  weighed.rate = kWorthwhile * tokens / cost(rows);
  for (size_t k = 0; k < weighed.order.size(); ++k) {
    tokens += weighed.reach[static_cast<size_t>(weighed.order[k])];
    const double rate = tokens / cost(rows + static_cast<int64_t>(k) + 1);
    if (rate > weighed.rate) {
      weighed.rate = rate;
      weighed.n_kept = k + 1;
    }
  }
  return weighed;
}

void Controller::prune(DraftTree& tree) {
  Weighed weighed = weigh(tree);
  size_t n_kept = weighed.n_kept;
  if (n_kept > 0 || weighed.order.empty()) {
    refused_ = 0;
    if (n_kept > 0) retry_after_ = kRetry;
  } else if (++refused_ >= retry_after_) {
    refused_ = 0;
    retry_after_ = std::min(2 * retry_after_, kLongestRetry);
    // Guesses that are more often right than not.
    while (n_kept < weighed.order.size() && weighed.reach[static_cast<size_t>(weighed.order[n_kept])] > 0.5) ++n_kept;
  }
  std::vector<bool> kept(weighed.reach.size(), false);
  for (size_t k = 0; k < n_kept; ++k) kept[static_cast<size_t>(weighed.order[k])] = true;
  tree.keep(std::move(kept));
}

void Controller::account(int64_t n_tokens, double ms, double likely_ms) {
  note(n_tokens, ms);
  balance_ms_ = std::min(balance_ms_ + static_cast<double>(n_tokens) * cost(1) - likely_ms, kWinPasses * cost(1));
}

void Controller::begin_text() {
  balance_ms_ = std::min(0.0, balance_ms_ + kLossShare * total_ms_);
  total_ms_ = 0;
}

void Controller::learn(const DraftTree& proposed, std::span<const int32_t> tokens) {
  int32_t current = 0;
  for (size_t i = 0; i < tokens.size() && current >= 0; ++i) {
    for (int32_t node = current + 1; node < proposed.size(); ++node) {
      if (proposed.parents()[static_cast<size_t>(node)] != current) continue;
      acceptance.record(proposed.source(node), proposed.depth(node),
                        proposed.tokens()[static_cast<size_t>(node)] == tokens[i]);
    }
    current = proposed.child(current, tokens[i]);
  }
}

}  // namespace edge
