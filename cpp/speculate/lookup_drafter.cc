#include "speculate/lookup_drafter.h"

#include <algorithm>

namespace edge {
namespace {

constexpr size_t kContinuations = 3;
// Of one context: those that were met last stand first. A short one may have hundreds.
constexpr int kLooked = 24;

}  // namespace

Result<std::unique_ptr<LookupDrafter>> LookupDrafter::create(int64_t window_tokens, Budget& budget) {
  const int64_t window = std::max<int64_t>(window_tokens, 2);
  EDGE_ASSIGN(Block memory, budget.reserve(SuffixAutomaton::bytes(window), "speculation"));
  return std::unique_ptr<LookupDrafter>(new LookupDrafter(window, std::move(memory)));
}

int LookupDrafter::level_of(int64_t length) {
  constexpr int64_t kUpTo[kLevels - 1] = {1, 2, 3, 5, 8, 15};
  int level = 0;
  while (level < kLevels - 1 && length > kUpTo[level]) ++level;
  return level;
}

double LookupDrafter::prior(int i) const {
  const int level = i % kLevels;
  return i < kLevels ? 0.2 + 0.1 * level : i < 2 * kLevels ? 0.1 + 0.1 * level : 0.1;
}

void LookupDrafter::read(std::span<const int32_t> text) {
  const auto n = static_cast<int64_t>(text.size());
  if (n_read_ == 0) automaton_.clear();
  for (; n_read_ < n; ++n_read_) {
    if (automaton_.full()) {
      const int64_t kept = automaton_.n_tokens() / 2;
      automaton_.clear();
      for (int64_t i = n_read_ - kept; i < n_read_; ++i) automaton_.append(text[static_cast<size_t>(i)]);
    }
    automaton_.append(text[static_cast<size_t>(n_read_)]);
  }
}

Status LookupDrafter::propose(const DraftContext& context, DraftTree& tree) {
  const std::span<const int32_t> text = context.text;
  read(text);
  const auto n = static_cast<int64_t>(text.size());
  const int64_t begin = n - automaton_.n_tokens();  // of what is remembered
  std::vector<int32_t> firsts;
  for (int32_t state = automaton_.longest(); state > 0; state = automaton_.shorter(state)) {
    guesses_.clear();
    automaton_.continuations(state, [&](int32_t token, int64_t end) {
      guesses_.push_back({token, begin + end});
      return guesses_.size() < kLooked;
    });
    const bool always = guesses_.size() == 1;
    std::sort(guesses_.begin(), guesses_.end(), [](const Guess& a, const Guess& b) { return a.end > b.end; });
    const int level = level_of(automaton_.length(state));
    for (const Guess& guess : guesses_) {
      const int kind = firsts.empty() ? (always ? 0 : 1) : 2;
      if (std::find(firsts.begin(), firsts.end(), guess.token) != firsts.end()) continue;
      if (firsts.size() == kContinuations || tree.full()) return {};
      firsts.push_back(guess.token);
      const auto source = static_cast<uint8_t>(first_source() + kind * kLevels + level);
      // A text that repeats with a short period goes on into its own draft.
      const int64_t period = n - guess.end;
      double reach = 1;
      int32_t node = 0;
      for (int64_t depth = 1; depth <= context.depth; ++depth) {
        node = tree.add(node, text[static_cast<size_t>(guess.end + (depth - 1) % period)], source);
        if (node < 0) break;
        // The first that is not worth its row is judged all the same; those behind it would only take time.
        if (context.acceptance == nullptr) continue;
        reach *= context.acceptance->rate(source, depth);
        if (reach < context.least_reach) break;
      }
    }
  }
  return {};
}

}  // namespace edge
