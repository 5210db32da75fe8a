#include "speculate/lookup_drafter.h"

#include <algorithm>
#include <bit>

namespace edge {
namespace {

constexpr int kSteps = 12;          // positions looked at in one chain
constexpr int64_t kLongest = 24;    // agreement beyond this tells nothing more
constexpr size_t kContinuations = 3;

uint64_t hash_of(std::span<const int32_t> text, int64_t end, int64_t n) {
  uint64_t hash = 0;
  for (int64_t i = end - n + 1; i <= end; ++i) {
    hash = (hash + static_cast<uint32_t>(text[static_cast<size_t>(i)]) + 1) * 0x9E3779B97F4A7C15;
  }
  return hash >> 32;
}

}  // namespace

uint64_t LookupDrafter::bytes(int64_t window_tokens) {
  return std::bit_ceil(static_cast<uint64_t>(window_tokens)) * 2 * kN * sizeof(int32_t);
}

Result<std::unique_ptr<LookupDrafter>> LookupDrafter::create(int64_t window_tokens, Budget& budget) {
  EDGE_ASSIGN(Block memory, budget.reserve(bytes(window_tokens), "speculation"));
  const int64_t window = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(window_tokens)));
  return std::unique_ptr<LookupDrafter>(new LookupDrafter(window, std::move(memory)));
}

LookupDrafter::LookupDrafter(int64_t window, Block memory) : window_(window), memory_(std::move(memory)) { restart(); }

void LookupDrafter::restart() {
  n_indexed_ = 0;
  for (int order = 0; order < kN; ++order) std::fill_n(heads(order), window_, -1);
}

// Every position but the last: that one is looked up, not found.
void LookupDrafter::index(std::span<const int32_t> text) {
  const int64_t n = static_cast<int64_t>(text.size()) - 1;
  for (n_indexed_ = std::max(n_indexed_, n - window_); n_indexed_ < n; ++n_indexed_) {
    for (int order = 0; order < kN; ++order) {
      if (n_indexed_ + 1 < kOrders[order]) continue;
      const uint64_t slot = hash_of(text, n_indexed_, kOrders[order]) & static_cast<uint64_t>(window_ - 1);
      int32_t* head = heads(order) + slot;
      previous(order)[n_indexed_ & (window_ - 1)] = *head;
      *head = static_cast<int32_t>(n_indexed_);
    }
  }
}

uint8_t LookupDrafter::source_of(int64_t length) {
  constexpr int64_t kUpTo[kSources - 1] = {2, 3, 5, 8, 15};
  uint8_t source = 0;
  while (source < kSources - 1 && length > kUpTo[source]) ++source;
  return source;
}

Status LookupDrafter::propose(const DraftContext& context, DraftTree& tree) {
  const std::span<const int32_t> text = context.text;
  index(text);
  const int64_t n = static_cast<int64_t>(text.size()), last = n - 1;
  std::vector<Match> matches;  // longest first, the latest of equals
  for (int order = 0; order < kN; ++order) {
    if (n < kOrders[order]) continue;
    int64_t at = heads(order)[hash_of(text, last, kOrders[order]) & static_cast<uint64_t>(window_ - 1)];
    for (int step = 0; step < kSteps && at >= 0 && at > last - window_; ++step) {
      int64_t length = 0;
      while (length < kLongest && length <= at && text[at - length] == text[last - length]) ++length;
      if (length >= kOrders[kN - 1]) matches.push_back({at, length});
      const int64_t before = previous(order)[at & (window_ - 1)];
      if (before >= at) break;  // its slot was taken by a later position
      at = before;
    }
  }
  std::stable_sort(matches.begin(), matches.end(), [](const Match& a, const Match& b) {
    return a.length != b.length ? a.length > b.length : a.end > b.end;
  });
  std::vector<int32_t> firsts, chain;
  for (const Match& match : matches) {
    const int32_t first = text[static_cast<size_t>(match.end) + 1];
    if (std::find(firsts.begin(), firsts.end(), first) != firsts.end()) continue;
    if (firsts.size() == kContinuations || tree.full()) break;
    firsts.push_back(first);
    const uint8_t source = static_cast<uint8_t>(first_source() + source_of(match.length));
    chain.clear();
    int32_t node = 0;
    while (node >= 0 && static_cast<int64_t>(chain.size()) < context.depth) {
      // A text that repeats with a short period goes on into its own draft.
      const int64_t next = match.end + 1 + static_cast<int64_t>(chain.size());
      chain.push_back(next < n ? text[static_cast<size_t>(next)] : chain[static_cast<size_t>(next - n)]);
      node = tree.add(node, chain.back(), source);
    }
  }
  return {};
}

}  // namespace edge
