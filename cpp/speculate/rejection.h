// Speculative sampling by rejection: exact in distribution whatever the drafts, though not the plain run's very tokens.
//
// A child x drawn from q is accepted with probability min(1, p(x) / q(x)); where it is not, p becomes the rest
// max(0, p - q) normalised (Leviathan et al. 2023, arXiv 2211.17192), q loses x, and the next child has its turn
// (multi-step: SpecInfer, arXiv 2305.09781; without replacement: Sequoia, arXiv 2402.12374). A child that was guessed
// without drawing is one drawn from a q that holds nothing else. When no child is left the token comes from the rest.
//
// Noise belongs to (seed, position, purpose), and each position of the text is decided once, so no number serves twice.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "speculate/acceptor.h"

namespace edge {

// Up to n tokens drawn one after the other from q [normalised], each without those before it.
std::vector<int32_t> draw_without_replacement(std::span<const TokenProbability> q, size_t n, uint64_t seed,
                                              uint64_t position);

// p [normalised, ascending tokens] is worked on. drawn: tokens in the order they were drawn from q; guesses: others.
int32_t draw_by_rejection(std::span<TokenProbability> p, std::span<const TokenProbability> q,
                          std::span<const int32_t> drawn, std::span<const int32_t> guesses, uint64_t seed,
                          uint64_t position);

class RejectionAcceptor final : public Acceptor {
 public:
  explicit RejectionAcceptor(Sampler& sampler) : sampler_(sampler) {}
  Result<SampledToken> draw(const DraftTree& tree, int32_t node, std::span<float> logits,
                            std::span<const int32_t> text) override;

 private:
  Sampler& sampler_;
};

// Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): takes the likeliest child whose probability is above
// min(epsilon, delta e^-entropy). LOSSY: the text is not the target's.
class TypicalAcceptor final : public Acceptor {
 public:
  TypicalAcceptor(Sampler& sampler, double epsilon, double delta)
      : sampler_(sampler), epsilon_(epsilon), delta_(delta) {}
  Result<SampledToken> draw(const DraftTree& tree, int32_t node, std::span<float> logits,
                            std::span<const int32_t> text) override;

 private:
  Sampler& sampler_;
  double epsilon_;
  double delta_;
};

}  // namespace edge
