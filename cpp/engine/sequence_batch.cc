// Several texts in one pass: the weights are read once for all of them, which is what a pass of one text waits for.
#include <algorithm>
#include <chrono>
#include <vector>

#include "engine/sequence.h"

namespace edge {
namespace {

// Rows of each text in a pass of at most max_rows: one for every text, then as many as the first ones have pending.
std::vector<int64_t> share_rows(std::span<const Sequence::Lane> lanes, int64_t max_rows) {
  std::vector<int64_t> n_rows(lanes.size(), 1);
  int64_t left = max_rows - static_cast<int64_t>(lanes.size());
  for (size_t i = 0; i < lanes.size(); ++i) {
    const int64_t more = std::min(left, lanes[i].text->n_pending() - 1);
    n_rows[i] += more;
    left -= more;
  }
  return n_rows;
}

}  // namespace

Result<std::unique_ptr<Sequence>> Sequence::fork(int64_t n_tokens) {
  if (n_tokens < 0 || n_tokens > static_cast<int64_t>(tokens_.size())) {
    return error(Code::kBadArgument, "fork: expected 0..%zu tokens, found %lld", tokens_.size(),
                 static_cast<long long>(n_tokens));
  }
  std::unique_ptr<Sequence> other(new Sequence(engine_));
  EDGE_TRY(other->kv_.share(kv_, std::min(n_tokens, kv_.n_committed())));
  other->tokens_.assign(tokens_.begin(), tokens_.begin() + n_tokens);
  other->forget_pass();
  return other;
}

Result<std::vector<std::optional<SampledToken>>> Sequence::step(Engine& engine, std::span<const Lane> lanes) {
  EDGE_TRY(engine.ready());
  Decoder& decoder = engine.decoder();
  const int64_t context = engine.options().context;
  if (lanes.empty() || static_cast<int64_t>(lanes.size()) > decoder.max_rows()) {
    return error(Code::kBadArgument, "step: expected 1..%lld texts, found %zu",
                 static_cast<long long>(decoder.max_rows()), lanes.size());
  }
  for (size_t i = 0; i < lanes.size(); ++i) {
    const Sequence& text = *lanes[i].text;
    const bool again = std::any_of(lanes.begin(), lanes.begin() + static_cast<std::ptrdiff_t>(i),
                                   [&](const Lane& lane) { return lane.text == &text; });
    if (&text.engine_ != &engine || again || text.n_pending() < 1) {
      return error(Code::kBadArgument, "step: text %zu: expected one of this engine, once, with a token pending, found %s", i,
                   again ? "it twice" : text.n_pending() < 1 ? "none pending" : "another engine's");
    }
    if (static_cast<int64_t>(text.tokens_.size()) >= context) {
      return error(Code::kContextOverflow, "token %zu does not fit the context of %lld tokens", text.tokens_.size() + 1,
                   static_cast<long long>(context));
    }
  }

  const std::vector<int64_t> n_rows = share_rows(lanes, decoder.max_rows());
  std::vector<BatchPart> parts;
  std::vector<int32_t> tokens, parents, last_rows;
  std::vector<size_t> drawn;  // lanes whose last token is in this pass
  for (size_t i = 0; i < lanes.size(); ++i) {
    Sequence& text = *lanes[i].text;
    const auto begin = text.tokens_.begin() + text.kv_.n_committed();
    for (int64_t row = 0; row < n_rows[i]; ++row) {
      parents.push_back(row == 0 ? -1 : static_cast<int32_t>(tokens.size()) - 1);
      tokens.push_back(begin[row]);
    }
    parts.push_back({&text.kv_, n_rows[i]});
    if (n_rows[i] < text.n_pending()) continue;
    drawn.push_back(i);
    last_rows.push_back(static_cast<int32_t>(tokens.size()) - 1);
  }
  EDGE_TRY(decoder.forward({tokens, parents}, parts));
  std::vector<std::optional<SampledToken>> out(lanes.size());
  const Status status = decoder.logits(last_rows, [&](size_t i, std::span<float> logits) -> Status {
    const Lane& lane = lanes[drawn[i]];
    EDGE_ASSIGN(out[drawn[i]], lane.sampler->sample(logits, lane.text->tokens_, lane.text->tokens_.size()));
    return {};
  });
  if (!status.ok()) {
    for (const BatchPart& part : parts) part.kv->rollback();
    engine.store().rewind();
    return status;
  }
  decoder.commit_all(parts);
  for (size_t i : drawn) {
    lanes[i].text->tokens_.push_back(out[i]->token);
    lanes[i].text->has_logits_ = false;
  }
  return out;
}

Result<std::vector<std::vector<SampledToken>>> Sequence::run(Engine& engine, std::span<const Lane> lanes, double ms,
                                                             std::span<const int32_t> ends) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point until = Clock::now() + std::chrono::microseconds(static_cast<int64_t>(1000 * ms));
  std::vector<std::vector<SampledToken>> out(lanes.size());
  std::vector<Lane> active(lanes.begin(), lanes.end());
  std::vector<size_t> at(lanes.size());
  for (size_t i = 0; i < at.size(); ++i) at[i] = i;
  do {
    EDGE_ASSIGN(auto drawn, step(engine, active));
    size_t n_left = 0;
    for (size_t i = 0; i < active.size(); ++i) {
      const Lane lane = active[i];
      const size_t from = at[i];
      bool ended = false;
      if (std::optional<SampledToken>& token = drawn[i]) {
        ended = std::find(ends.begin(), ends.end(), token->token) != ends.end();
        out[from].push_back(std::move(*token));
        ended = ended || static_cast<int64_t>(out[from].size()) >= lane.max_tokens;
      }
      if (ended) continue;
      active[n_left] = lane;
      at[n_left++] = from;
    }
    active.resize(n_left);
    at.resize(n_left);
  } while (!active.empty() && Clock::now() < until);
  return out;
}

}  // namespace edge
