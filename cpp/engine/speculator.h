// Speculation for one engine: drafters guess, one pass verifies, the controller decides what is worth guessing.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "engine/sequence.h"
#include "speculate/controller.h"
#include "speculate/drafter.h"

namespace edge {

// How a verified node's next token is decided (speculate/acceptor.h, speculate/rejection.h).
enum class AcceptRule { kCoupling, kRejection, kTypical };

struct SpeculationOptions {
  AcceptRule acceptance = AcceptRule::kCoupling;
  double epsilon = 0.09, delta = 0.3;  // of kTypical
  // Fixed sizes instead of the controller's choice: guesses deep (0: the controller chooses), and rows of a pass.
  int64_t depth = 0;
  int64_t max_rows = 33;
  std::vector<std::string> drafters;  // those asked; empty: all
  std::vector<std::string> always;    // those the controller does not turn off
};

struct DrafterStats {
  std::string name;
  int64_t tried = 0;     // guesses that met the target's token of their position
  int64_t accepted = 0;  // those that were it
  double ms = 0;         // spent on guessing
};

struct SpeculationStats {
  std::vector<DrafterStats> drafters;
  int64_t passes = 0;           // over drafts
  int64_t tokens = 0;           // that those passes gave
  int64_t plain_passes = 0;     // over the last token alone
  double saved_ms = 0;          // against a plain pass per token, as measured here
  std::vector<std::pair<int64_t, double>> pass_ms;  // (rows, milliseconds) as the controller knows them
};

class Speculator {
 public:
  // The engine must outlive it. One sequence at a time; drafters start again with another.
  explicit Speculator(Engine& engine);

  // For the steps to come; what was learned stays.
  void configure(SpeculationOptions options);
  // Takes the place of a drafter of the same name.
  void add(std::unique_ptr<Drafter> drafter);
  // draft: an engine of the same vocabulary, opened with this one as its partner; it must outlive the speculator.
  // is_copy: it is the same model at fewer bits.
  Status add_draft(Engine& draft, bool is_copy);
  // The heads of the engine's own pack, read into its budget. kUnsupported: it has none, or its output head streams.
  Status add_medusa();
  // Times passes over 1, 2, 4, 8 and 16 rows and what the drafters' guesses take, in a few milliseconds; nothing for
  // models whose passes are longer than that, which are timed as they come.
  Status measure();
  // Draws 1 or more tokens and appends them to the sequence, exactly as so many Sequence::next() would with the same
  // sampler. At most limits.max_tokens; none after a stop token.
  Result<std::vector<SampledToken>> step(Sequence& sequence, Sampler& sampler, const VerifyLimits& limits);
  SpeculationStats stats() const;
  // What the drafters proposed in the last step, before it was cut to what pays.
  const DraftTree& proposed() const { return proposed_; }
  Budget& budget() { return engine_.budget(); }

 private:
  // A drafter whose guesses take time is asked when they pay, and now and then to see whether they would.
  struct Turn {
    std::unique_ptr<Drafter> drafter;
    DrafterStats stats;
    bool enabled = true;
    bool always = false;
    Steady read, guess;  // a token of the text; a guess of a depth, or all where depth costs nothing
    int64_t idle_tokens = 0;
    int64_t probe_after_tokens = 64;
    int64_t probe_steps_left = 0;
  };

  void follow(Sequence& sequence);
  Result<std::vector<int32_t>> own_text(KvCache& kv, double until_ms);
  Status propose(Sequence& sequence, Sampler& sampler, int64_t room);
  void enable(Turn& turn) const;
  // rate: the tokens that a millisecond is worth.
  Status ask(Turn& turn, DraftContext context, int64_t depth, double rate, bool reads_for_free);
  double reading_ms(const Turn& turn, int64_t lag) const;
  bool asked_first(const Turn& turn) const { return turn.drafter->is_free() || turn.always; }
  Controller::Chain promise(const Turn& turn) const;
  bool probes(Turn& turn, double reading_ms);
  int32_t deepest(const Turn& turn) const;  // of its guesses in the tree
  std::unique_ptr<Acceptor> make_acceptor(Sampler& sampler) const;
  Result<std::vector<SampledToken>> plain(Sequence& sequence, Sampler& sampler, bool decodes);
  void count(const DraftTree& tree, const Verified& verified);

  Engine& engine_;
  SpeculationOptions options_;
  std::vector<Turn> turns_;
  uint8_t n_sources_ = 0;
  Controller controller_;
  DraftTree tree_, proposed_;
  uint64_t revision_ = 0;
  double invested_ms_ = 0;  // in this step
  double unlikely_ms_ = 0;  // of what drafting took in this step, the machine's doing
  SpeculationStats stats_;
};

}  // namespace edge
