#include "speculate/verify.h"

#include <algorithm>
#include <numeric>

#include "sample/log_prob.h"

namespace edge {

Result<Verified> verify(Decoder& decoder, KvCache& kv, const DraftTree& tree, Acceptor& acceptor,
                        const VerifyLimits& limits, bool wants_best, std::vector<int32_t>& text) {
  EDGE_TRY(decoder.forward({tree.tokens(), tree.parents()}, kv));
  Verified verified;
  verified.path.push_back(0);
  if (wants_best) verified.best.assign(static_cast<size_t>(tree.size()), -1);
  const size_t n_before = text.size();
  // Nodes come in topological order, so the path is met in order and no logits need to be kept.
  int32_t current = 0;
  const auto visit = [&](size_t row, std::span<float> logits) -> Status {
    if (wants_best) verified.best[row] = std::max(0, peak_logit(logits).token);
    if (static_cast<int32_t>(row) != current) return {};
    EDGE_ASSIGN(SampledToken token, acceptor.draw(tree, current, logits, text));
    const int32_t id = token.token;
    text.push_back(id);
    verified.tokens.push_back(std::move(token));
    const bool stops = std::find(limits.stop_tokens.begin(), limits.stop_tokens.end(), id) != limits.stop_tokens.end();
    const bool enough = static_cast<int64_t>(verified.tokens.size()) >= limits.max_tokens;
    current = stops || enough ? -1 : tree.child(current, id);
    if (current >= 0) verified.path.push_back(current);
    return {};
  };
  std::vector<int32_t> rows(static_cast<size_t>(tree.size()));
  std::iota(rows.begin(), rows.end(), 0);
  const Status status = decoder.logits(rows, visit);
  if (!status.ok()) {
    text.resize(n_before);
    return status;
  }
  return verified;
}

}  // namespace edge
