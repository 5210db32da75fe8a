// One pass over a draft tree: the target's own token at every node of the path that these tokens take.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kv/kv_cache.h"
#include "model/decoder.h"
#include "speculate/acceptor.h"
#include "speculate/draft_tree.h"

namespace edge {

struct VerifyLimits {
  int64_t max_tokens = 1;              // drawn in this pass
  std::span<const int32_t> stop_tokens;  // the walk ends after one of these
};

struct Verified {
  std::vector<int32_t> path;         // nodes kept, the root first
  std::vector<SampledToken> tokens;  // as many: the token drawn after each of them; the last one's pass is due
  std::vector<int32_t> best;         // [tree size], when asked for
};

// text ends with the root and grows by the tokens drawn; on error it is as before. The caller commits the path to `kv`,
// or rolls back.
Result<Verified> verify(Decoder& decoder, KvCache& kv, const DraftTree& tree, Acceptor& acceptor,
                        const VerifyLimits& limits, bool wants_best, std::vector<int32_t>& text);

}  // namespace edge
