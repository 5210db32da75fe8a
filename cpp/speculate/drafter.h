// Who guesses the next tokens. A guess may be anything: it costs time when wrong, never a different text.
#pragma once

#include <cstdint>
#include <span>

#include "core/status.h"
#include "sample/sampler.h"
#include "speculate/controller.h"
#include "speculate/draft_tree.h"

namespace edge {

// What a drafter may look at. text ends with the root of the tree, whose own pass is still due.
struct DraftContext {
  std::span<const int32_t> text;
  // The request's sampler: a drafter with a distribution draws from it as the target will, noise included.
  const Sampler* sampler = nullptr;
  // Final-normed hidden state [hidden_size] of the token before the root; empty unless wants_hidden().
  std::span<const float> hidden;
  // How deep is worth the drafter's own time; the tree's limits hold besides.
  int64_t depth = 0;
  // How often guesses are accepted, and below which probability of being reached a further guess is not worth its
  // time; null: draft as deep as told.
  const Acceptance* acceptance = nullptr;
  double least_reach = 0;
  // Rejection sampling needs the distribution that children were drawn from.
  bool wants_distributions = false;
};

// What one verification pass found.
struct VerifiedPass {
  const DraftTree& tree;
  std::span<const int32_t> path;  // nodes kept, the root first
  std::span<const int32_t> best;  // [tree size]: the most likely token after each node; empty unless wants_best()
};

class Drafter {
 public:
  virtual ~Drafter() = default;

  virtual const char* name() const = 0;
  // The text was replaced or cut; what follows is told by the next propose().
  virtual void restart() = 0;
  // Adds nodes below the root (other drafters may have added some already).
  virtual Status propose(const DraftContext& context, DraftTree& tree) = 0;
  virtual void observe(const VerifiedPass& pass) { (void)pass; }

  // Sources are numbered first_source() .. first_source() + n_sources() - 1: guesses that are accepted about as often.
  virtual uint8_t n_sources() const { return 1; }
  // Of the i-th source, until guesses were judged: the share that is accepted.
  virtual double prior(int i) const { return (void)i, 0.5; }
  // Those of its likeliest guess at a depth.
  struct Sources {
    uint8_t first;
    int count;
  };
  virtual Sources chain_sources(int64_t depth) const { return (void)depth, Sources{first_source(), n_sources()}; }
  // Tokens of the text that this drafter has yet to read before it can guess.
  virtual int64_t lag(std::span<const int32_t> text) const { return (void)text, 0; }
  // Reads them, all but the last.
  virtual Status read(const DraftContext& context) { return (void)context, Status(); }
  virtual bool wants_hidden() const { return false; }
  virtual bool wants_best() const { return false; }
  // Rows that a pass carries for the drafter's own sake.
  virtual int64_t rider_rows() const { return 0; }
  // Steps that it takes to see whether it pays.
  virtual int64_t probe_steps() const { return 1; }
  // False where one guess costs as much as the deepest.
  virtual bool costs_by_depth() const { return true; }
  // Guesses cost next to nothing, so they may be judged without being verified.
  virtual bool is_free() const { return false; }

  uint8_t first_source() const { return first_source_; }
  void set_first_source(uint8_t source) { first_source_ = source; }

 private:
  uint8_t first_source_ = 0;
};

}  // namespace edge
