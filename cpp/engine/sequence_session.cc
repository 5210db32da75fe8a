#include "engine/sequence.h"
#include "kv/kv_session.h"

namespace edge {
namespace {

SessionModel model_of(Engine& engine) {
  return {engine.directory().digest(), engine.decoder().config().vocab_size, engine.options().context};
}

}  // namespace

Status Sequence::save(const std::string& path) {
  return save_session(path, model_of(engine_), tokens_, kv_, engine_.decoder().interrupted);
}

Status Sequence::load(const std::string& path) {
  tokens_.clear();
  forget_pass();
  EDGE_ASSIGN(tokens_, load_session(path, model_of(engine_), kv_, engine_.decoder().interrupted));
  // The logits of the last token are not saved: it is computed again.
  if (n_pending() == 0 && !tokens_.empty()) kv_.truncate(static_cast<int64_t>(tokens_.size()) - 1);
  return {};
}

}  // namespace edge
