// Drafts what followed the same words before (prompt lookup, Saxena 2023). Needs no weights: copying, editing, code and
// answers about a given text repeat themselves.
//
// The longest end of the text that occurred before, and what followed it there, come from a suffix automaton: a token
// costs O(1) on average and some 100 bytes, whatever the text. Shorter ends follow where the longest leaves guesses open.
#pragma once

#include <memory>

#include "core/budget.h"
#include "speculate/drafter.h"
#include "speculate/suffix_automaton.h"

namespace edge {

class LookupDrafter final : public Drafter {
 public:
  // window_tokens: how far back it remembers; once there are as many, the earlier half is forgotten.
  static Result<std::unique_ptr<LookupDrafter>> create(int64_t window_tokens, Budget& budget);

  const char* name() const override { return "lookup"; }
  void restart() override { n_read_ = 0; }
  Status propose(const DraftContext& context, DraftTree& tree) override;
  uint8_t n_sources() const override { return kSources; }
  double prior(int i) const override;
  bool is_free() const override { return true; }

 private:
  // By how many tokens agree; what always followed them, what followed them last, what followed them once.
  static constexpr int kLevels = 7;
  static constexpr uint8_t kSources = 3 * kLevels;

  struct Guess {
    int32_t token;
    int64_t end;  // where it stood
  };

  LookupDrafter(int64_t window, Block memory) : automaton_(window, std::move(memory)) {}
  void read(std::span<const int32_t> text);
  static int level_of(int64_t length);

  SuffixAutomaton automaton_;
  int64_t n_read_ = 0;  // of the text
  std::vector<Guess> guesses_;
};

}  // namespace edge
