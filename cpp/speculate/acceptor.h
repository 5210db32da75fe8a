// Which token follows a verified node. Every rule but the one marked lossy leaves the target's distribution as it is.
#pragma once

#include <span>

#include "core/status.h"
#include "sample/sampler.h"
#include "speculate/draft_tree.h"

namespace edge {

class Acceptor {
 public:
  virtual ~Acceptor() = default;
  // The token after `node`, given the target's logits there [vocab_size] (left as they were) and the text up to and
  // including the node. The walk goes on at the child that carries it, if there is one.
  virtual Result<SampledToken> draw(const DraftTree& tree, int32_t node, std::span<float> logits,
                                    std::span<const int32_t> text) = 0;
};

// Draws what the plain path would draw at this position, whatever was drafted: the noise belongs to (seed, position,
// token), so the text is the same token for token (Daliri et al. 2024, arXiv 2408.07978). Greedy is temperature 0.
class CouplingAcceptor final : public Acceptor {
 public:
  explicit CouplingAcceptor(Sampler& sampler) : sampler_(sampler) {}
  Result<SampledToken> draw(const DraftTree&, int32_t, std::span<float> logits,
                            std::span<const int32_t> text) override {
    return sampler_.sample(logits, text, text.size());
  }

 private:
  Sampler& sampler_;
};

}  // namespace edge
