// Drafts what followed the same words before (prompt lookup, Saxena 2023). Needs no weights: copying, editing, code and
// answers about a given text repeat themselves.
//
// Every position of the text hangs in two chains, of positions whose last 5 and last 2 tokens hash alike. A look-up
// walks a bounded number of them and measures how far each agrees with the end of the text, so a token costs O(1) and
// 16 bytes of a window of fixed size.
#pragma once

#include <memory>

#include "core/budget.h"
#include "speculate/drafter.h"

namespace edge {

class LookupDrafter final : public Drafter {
 public:
  // window_tokens: how far back it remembers, rounded up to a power of two.
  static Result<std::unique_ptr<LookupDrafter>> create(int64_t window_tokens, Budget& budget);
  static uint64_t bytes(int64_t window_tokens);

  const char* name() const override { return "lookup"; }
  void restart() override;
  Status propose(const DraftContext& context, DraftTree& tree) override;
  uint8_t n_sources() const override { return kSources; }
  double prior(int i) const override { return 0.3 + 0.1 * i; }
  bool is_free() const override { return true; }

 private:
  static constexpr int64_t kOrders[] = {5, 2};
  static constexpr int kN = 2;
  static constexpr uint8_t kSources = 6;  // by how many tokens agree

  struct Match {
    int64_t end;     // position of the last agreeing token
    int64_t length;  // how many agree
  };

  LookupDrafter(int64_t window, Block memory);
  int32_t* heads(int order) const { return memory_.as<int32_t>() + 2 * order * window_; }
  int32_t* previous(int order) const { return heads(order) + window_; }
  void index(std::span<const int32_t> text);
  static uint8_t source_of(int64_t length);

  int64_t window_;  // a power of two
  Block memory_;    // per order: heads by hash, and by position the one before in its chain
  int64_t n_indexed_ = 0;
};

}  // namespace edge
