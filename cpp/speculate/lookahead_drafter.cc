#include "speculate/lookahead_drafter.h"

#include <algorithm>

namespace edge {

LookaheadDrafter::LookaheadDrafter(int64_t window, int64_t n, int64_t n_grams)
    : window_(window), n_(n), n_grams_(n_grams), buckets_(kBuckets) {}

void LookaheadDrafter::restart() {
  levels_.clear();
  nodes_.clear();
  for (Bucket& one : buckets_) one.first = -1;
}

// Any tokens do to begin with; those of the text are likelier than others.
void LookaheadDrafter::fill(std::span<const int32_t> text) {
  levels_.resize(static_cast<size_t>(window_ * (n_ - 1)));
  for (size_t i = 0; i < levels_.size(); ++i) levels_[i] = text[i % text.size()];
}

void LookaheadDrafter::remember(int32_t first, std::span<const int32_t> tail) {
  Bucket& into = bucket(first);
  if (into.first != first) into = {first, {}};
  const size_t length = tail.size();
  for (size_t at = 0; at < into.tails.size(); at += length) {
    if (!std::equal(tail.begin(), tail.end(), into.tails.begin() + static_cast<ptrdiff_t>(at))) continue;
    into.tails.erase(into.tails.begin() + static_cast<ptrdiff_t>(at),
                     into.tails.begin() + static_cast<ptrdiff_t>(at + length));
    break;
  }
  into.tails.insert(into.tails.begin(), tail.begin(), tail.end());
  into.tails.resize(std::min(into.tails.size(), static_cast<size_t>(n_grams_) * length));
}

Status LookaheadDrafter::propose(const DraftContext& context, DraftTree& tree) {
  nodes_.clear();
  if (levels_.empty()) fill(context.text);
  const Bucket& known = bucket(context.text.back());
  if (known.first == context.text.back()) {
    for (size_t at = 0; at < known.tails.size(); at += static_cast<size_t>(n_ - 1)) {
      int32_t node = 0;
      for (int64_t i = 0; i < n_ - 1 && node >= 0; ++i) {
        node = tree.add(node, known.tails[at + static_cast<size_t>(i)], first_source());
      }
    }
  }
  // Level 0 is a chain below the root; below each of its nodes hangs the rest of its column. So every row sees the text,
  // level 0 up to its column, and its column above itself; and its place is that of its depth.
  std::vector<int32_t> nodes(levels_.size());
  for (int64_t level = 0; level < n_ - 1; ++level) {
    for (int64_t column = 0; column < window_; ++column) {
      const size_t at = static_cast<size_t>(level * window_ + column);
      const int32_t above = level > 0 ? nodes[at - static_cast<size_t>(window_)] : column > 0 ? nodes[at - 1] : 0;
      nodes[at] = tree.add(above, levels_[at], static_cast<uint8_t>(first_source() + 1));
      if (nodes[at] < 0) return {};  // no room for the whole window: it stays as it is
    }
  }
  for (const int32_t node : nodes) tree.pin(node);
  nodes_ = std::move(nodes);
  return {};
}

void LookaheadDrafter::observe(const VerifiedPass& pass) {
  if (nodes_.empty()) return;
  const size_t w = static_cast<size_t>(window_), n_levels = static_cast<size_t>(n_ - 1);
  std::vector<int32_t> column(n_levels);
  for (size_t i = 0; i < w; ++i) {
    for (size_t level = 1; level < n_levels; ++level) column[level - 1] = levels_[level * w + i];
    column[n_levels - 1] = pass.best[static_cast<size_t>(pass.tree.moved(nodes_[(n_levels - 1) * w + i]))];
    remember(levels_[i], column);
    for (size_t level = 0; level < n_levels; ++level) levels_[level * w + i] = column[level];
  }
  nodes_.clear();
}

}  // namespace edge
