#include "speculate/controller.h"

#include <algorithm>
#include <numeric>

namespace edge {
namespace {

// Weight of a new measurement, and how far off one may be: another process may take the core in the middle of a pass.
constexpr double kFresh = 0.15;
constexpr double kOutlier = 2.5;
// What a further row costs, as a share of the first, until it was measured.
constexpr double kRowPrior = 0.15;
constexpr double kDecay = 0.97;
constexpr double kPriorWeight = 3;
// A tree must promise this much more than it costs: estimates err.
constexpr double kWorthwhile = 1.03;
constexpr double kLossShare = 0.02;
constexpr double kLossPasses = 3;
constexpr double kWinPasses = 30;

}  // namespace

void PassCost::record(int64_t rows, double ms) {
  if (rows < 1 || rows > kMaxRows || !(ms > 0)) return;
  double& known = ms_[static_cast<size_t>(rows)];
  known = known > 0 ? known + kFresh * (std::min(ms, kOutlier * known) - known) : ms;
}

double PassCost::operator()(int64_t rows) const {
  rows = std::clamp<int64_t>(rows, 1, kMaxRows);
  if (ms_[static_cast<size_t>(rows)] > 0) return ms_[static_cast<size_t>(rows)];
  int64_t below = rows, above = rows;
  while (below > 1 && !(ms_[static_cast<size_t>(below)] > 0)) --below;
  while (above <= kMaxRows && !(ms_[static_cast<size_t>(above)] > 0)) ++above;
  const double low = ms_[static_cast<size_t>(below)];
  const double slope = above <= kMaxRows
                           ? (ms_[static_cast<size_t>(above)] - low) / static_cast<double>(above - below)
                           : std::max(kRowPrior * ms_[1], below > 1 ? (low - ms_[1]) / static_cast<double>(below - 1) : 0.0);
  return low + slope * static_cast<double>(rows - below);
}

void Acceptance::record(uint8_t source, int64_t depth, bool accepted) {
  if (source >= kMaxSources || depth < 1) return;
  Count& count = counts_[source][static_cast<size_t>(std::min(depth, kMaxDepth) - 1)];
  count.tried = count.tried * kDecay + 1;
  count.accepted = count.accepted * kDecay + (accepted ? 1 : 0);
}

void Acceptance::fade(uint8_t source) {
  for (Count& count : counts_[source]) {
    count.tried /= 2;
    count.accepted /= 2;
  }
}

double Acceptance::rate(uint8_t source, int64_t depth) const {
  if (source >= kMaxSources || depth < 1) return 0;
  const Count& count = counts_[source][static_cast<size_t>(std::min(depth, kMaxDepth) - 1)];
  return (count.accepted + kPriorWeight * prior_[source]) / (count.tried + kPriorWeight);
}

bool Controller::may_spend() const {
  return cost.known() && balance_ms_ > -(kLossPasses * cost(1) + kLossShare * total_ms_);
}

int64_t Controller::chain_depth(uint8_t source, double draft_ms, int64_t max_depth) const {
  double reach = 1, tokens = 1, best = kWorthwhile / cost(1);
  int64_t best_depth = 0;
  for (int64_t depth = 1; depth <= max_depth; ++depth) {
    reach *= acceptance.rate(source, depth);
    tokens += reach;
    const double rate = tokens / (cost(depth + 1) + static_cast<double>(depth) * draft_ms);
    if (rate > best) {
      best = rate;
      best_depth = depth;
    }
  }
  return best_depth;
}

void Controller::prune(DraftTree& tree) const {
  const size_t n = static_cast<size_t>(tree.size());
  std::vector<double> reach(n, 1);  // probability that the path comes to the node
  std::vector<int32_t> order(n - 1);
  for (size_t i = 1; i < n; ++i) {
    const int32_t node = static_cast<int32_t>(i);
    reach[i] = reach[static_cast<size_t>(tree.parents()[i])] * acceptance.rate(tree.source(node), tree.depth(node));
    order[i - 1] = node;
  }
  // No node outranks its parent, and a stable sort leaves a parent before its equals.
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return reach[static_cast<size_t>(a)] > reach[static_cast<size_t>(b)];
  });
  double tokens = 1, best = kWorthwhile / cost(1);
  size_t n_kept = 0;
  for (size_t k = 0; k < order.size(); ++k) {
    tokens += reach[static_cast<size_t>(order[k])];
    const double rate = tokens / cost(static_cast<int64_t>(k) + 2);
    if (rate > best) {
      best = rate;
      n_kept = k + 1;
    }
  }
  std::vector<bool> kept(n, false);
  for (size_t k = 0; k < n_kept; ++k) kept[static_cast<size_t>(order[k])] = true;
  tree.keep(kept);
}

void Controller::account(int64_t n_tokens, double ms) {
  const double won_ms = static_cast<double>(n_tokens) * cost(1) - ms;
  saved_ms_ += won_ms;
  total_ms_ += ms;
  balance_ms_ = std::min(balance_ms_ + won_ms, kWinPasses * cost(1));
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
