#include "engine/speculator.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "speculate/medusa_drafter.h"
#include "speculate/model_drafter.h"
#include "speculate/rejection.h"
#include "store/placed_store.h"

namespace edge {
namespace {

constexpr int64_t kDeepest = Acceptance::kMaxDepth;
constexpr int64_t kFirstProbe = 64;
constexpr int64_t kLongestProbe = 2048;
constexpr int64_t kProbeDepth = 2;
// Until a drafter's time was measured, as a share of a plain pass.
constexpr double kDraftPrior = 0.1;
// A pass that carries a drafter's own rows is not even tried when they cost more than this share of a plain one.
constexpr double kDearestRiders = 0.6;
// What a further row costs until it was measured, as a share of a plain pass, where weights stream.
constexpr double kStreamedRow = 0.02;
constexpr double kReadPrior = 0.03;  // of reading a token of the text
// Guesses over which the cost of a further row is taken.
constexpr int64_t kRowsAhead = 4;
// A drafter this far behind reads and guesses in one.
constexpr int64_t kNoLag = 20;
// Tokens over which catching up must pay.
constexpr int64_t kHorizon = 256;
// What measure() may take, for passes and again for guesses, and weights too large for it.
constexpr double kMeasureMs = 25;
constexpr uint64_t kMeasureBytes = 64 << 20;
constexpr int64_t kMeasureRows = 16;
constexpr int64_t kOwnTextTopK = 20;

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Speculator::Speculator(Engine& engine) : engine_(engine) {
  if (!engine.options().plan.stream_order.empty()) controller_.cost.set_row_prior(kStreamedRow);
}

void Speculator::configure(SpeculationOptions options) {
  options_ = std::move(options);
  for (Turn& turn : turns_) enable(turn);
}

void Speculator::enable(Turn& turn) const {
  const auto named = [&](const std::vector<std::string>& names) {
    return std::find(names.begin(), names.end(), turn.stats.name) != names.end();
  };
  turn.enabled = options_.drafters.empty() || named(options_.drafters);
  turn.always = named(options_.always);
}

void Speculator::add(std::unique_ptr<Drafter> drafter) {
  revision_ = 0;
  for (Turn& turn : turns_) {
    if (turn.stats.name != drafter->name()) continue;
    drafter->set_first_source(turn.drafter->first_source());
    turn.drafter = std::move(drafter);
    return;
  }
  drafter->set_first_source(n_sources_);
  for (int i = 0; i < drafter->n_sources(); ++i) controller_.acceptance.set_prior(n_sources_++, drafter->prior(i));
  Turn turn;
  turn.stats.name = drafter->name();
  turn.drafter = std::move(drafter);
  enable(turn);
  turns_.push_back(std::move(turn));
}

Status Speculator::add_draft(Engine& draft, bool is_copy) {
  // A cancelled request ends in the draft model's layers too.
  draft.decoder().interrupted = engine_.decoder().interrupted;
  EDGE_ASSIGN(auto drafter, ModelDrafter::create(draft.decoder(), draft.kv_pool(), draft.options().context,
                                                 static_cast<int32_t>(engine_.decoder().config().vocab_size),
                                                 is_copy, draft.budget()));
  add(std::move(drafter));
  return {};
}

Status Speculator::add_medusa() {
  const EngineOptions& options = engine_.options();
  const WeightId head = engine_.decoder().head();
  if (options.plan.placement[static_cast<size_t>(head)] == Placement::kStream) {
    return error(Code::kUnsupported, "medusa: expected the output head in memory, found it streamed");
  }
  const PackDirectory& directory = engine_.directory();
  StorePlan plan;
  plan.placement.assign(directory.entries().size(), Placement::kUnused);
  for (size_t i = 0; i < plan.placement.size(); ++i) {
    if (directory.entries()[i].name.starts_with("medusa.")) plan.placement[i] = Placement::kResident;
  }
  EDGE_ASSIGN(auto store, open_store(options.pack_path, directory, plan, options.store, engine_.budget()));
  EDGE_ASSIGN(auto drafter, MedusaDrafter::create(engine_.decoder(), directory, std::move(store), engine_.kernels(),
                                                  engine_.pool(), engine_.budget()));
  add(std::move(drafter));
  return {};
}

void Speculator::follow(Sequence& sequence) {
  if (revision_ == sequence.revision()) return;
  revision_ = sequence.revision();
  controller_.begin_text();
  for (Turn& turn : turns_) {
    turn.drafter->restart();
    if (turn.enabled && turn.drafter->wants_hidden()) sequence.keep_hidden();
  }
}

Result<std::vector<SampledToken>> Speculator::plain(Sequence& sequence, Sampler& sampler, bool decodes) {
  const double start = now_ms();
  EDGE_ASSIGN(SampledToken token, sequence.next(sampler));
  if (decodes) {
    const double ms = now_ms() - start;
    controller_.cost.record(1, ms);
    controller_.account_plain(ms);
    ++stats_.plain_passes;
  }
  return std::vector<SampledToken>{std::move(token)};
}

// What a drafter whose guesses take time promises, as things are.
Controller::Chain Speculator::promise(const Turn& turn) const {
  const Drafter& drafter = *turn.drafter;
  if (!controller_.may_spend(0)) return {};
  const double riders_ms = controller_.cost(1 + drafter.rider_rows()) - controller_.cost(1);
  const double ms = riders_ms + (turn.guess.known() ? turn.guess.ms() : kDraftPrior * controller_.cost(1));
  std::array<double, kDeepest> rates;
  for (int64_t depth = 1; depth <= kDeepest; ++depth) {
    const Drafter::Sources sources = drafter.chain_sources(depth);
    rates[static_cast<size_t>(depth) - 1] = controller_.acceptance.rate(sources.first, sources.count, depth);
  }
  if (drafter.costs_by_depth()) return controller_.chain(rates, 0, ms);
  Controller::Chain chain = controller_.chain(rates, ms, 0);
  if (chain.depth > 0) chain.depth = kDeepest;
  return chain;
}

// What it takes a drafter to catch up with the text.
double Speculator::reading_ms(const Turn& turn, int64_t lag) const {
  if (lag <= kNoLag) return 0;
  const double ms = turn.read.known() ? turn.read.ms() : kReadPrior * controller_.cost(1);
  return static_cast<double>(lag) * ms;
}

// Whether a drafter that does not seem to pay is asked all the same, now and then, to see whether it would by now.
bool Speculator::probes(Turn& turn, double reading_ms) {
  if (turn.probe_steps_left > 0) {
    --turn.probe_steps_left;
    return controller_.may_spend(0);
  }
  if (++turn.idle_tokens < turn.probe_after_tokens || !controller_.may_spend(reading_ms)) return false;
  turn.idle_tokens = 0;
  turn.probe_after_tokens = std::min(2 * turn.probe_after_tokens, kLongestProbe);
  const double plain_ms = controller_.cost(1);
  if (controller_.cost(1 + turn.drafter->rider_rows()) - plain_ms > kDearestRiders * plain_ms) return false;
  turn.probe_steps_left = turn.drafter->probe_steps() - 1;
  const int first = turn.drafter->first_source();
  for (int i = 0; i < turn.drafter->n_sources(); ++i) controller_.acceptance.fade(static_cast<uint8_t>(first + i));
  return true;
}

int32_t Speculator::deepest(const Turn& turn) const {
  const Drafter& drafter = *turn.drafter;
  int32_t deepest = 0;
  for (int32_t node = 1; node < tree_.size(); ++node) {
    const int source = tree_.source(node) - drafter.first_source();
    if (source >= 0 && source < drafter.n_sources()) deepest = std::max(deepest, tree_.depth(node));
  }
  return deepest;
}

Status Speculator::ask(Turn& turn, DraftContext context, int64_t depth, double rate, bool reads_for_free) {
  const bool by_depth = turn.drafter->costs_by_depth();
  const double usual_ms = turn.guess.ms();
  context.depth = depth;
  if (controller_.cost.known()) {
    context.least_reach = controller_.least_reach(std::min(depth, kRowsAhead), by_depth ? usual_ms : 0, rate);
  }
  const double start = now_ms();
  double begin = start;
  if (const int64_t lag = turn.drafter->lag(context.text); lag > kNoLag) {
    EDGE_TRY(turn.drafter->read(context));
    begin = now_ms();
    turn.read.record((begin - start) / static_cast<double>(lag));
  }
  EDGE_TRY(turn.drafter->propose(context, tree_));
  const double end = now_ms();
  const double n_guesses = by_depth ? std::max(1, deepest(turn)) : 1;
  turn.guess.record((end - begin) / n_guesses);
  turn.stats.ms += end - start;
  unlikely_ms_ += end - begin - likely_ms(end - begin, n_guesses * usual_ms);
  // A drafter that promises to win its reading back is not held to account for it.
  if (reads_for_free) {
    controller_.invest(begin - start);
    invested_ms_ += begin - start;
  }
  return {};
}

Status Speculator::propose(Sequence& sequence, Sampler& sampler, int64_t room) {
  DraftContext context;
  context.text = sequence.tokens();
  context.sampler = &sampler;
  context.hidden = sequence.hidden();
  context.wants_distributions = options_.acceptance == AcceptRule::kRejection;
  if (options_.depth > 0) {
    for (Turn& turn : turns_) {
      if (turn.enabled) EDGE_TRY(ask(turn, context, options_.depth, 0, true));
    }
    return {};
  }
  context.acceptance = &controller_.acceptance;
  const double plain_rate = controller_.cost.known() ? 1 / controller_.cost(1) : 0;
  for (Turn& turn : turns_) {
    if (turn.enabled && asked_first(turn)) EDGE_TRY(ask(turn, context, kDeepest, plain_rate, true));
  }
  // Of those whose guesses take time the one that promises most, if it is more than is there for nothing.
  Controller::Chain best{0, controller_.rate(tree_)};
  const Turn* chosen = nullptr;
  for (const Turn& turn : turns_) {
    if (!turn.enabled || asked_first(turn)) continue;
    const Controller::Chain chain = promise(turn);
    if (chain.depth == 0 || chain.rate <= best.rate) continue;
    // Catching up is worth it when the tokens to come win it back.
    const double won_ms = static_cast<double>(std::min(room, kHorizon)) * (controller_.cost(1) - 1 / chain.rate);
    if (reading_ms(turn, turn.drafter->lag(context.text)) > won_ms) continue;
    best = chain;
    chosen = &turn;
  }
  for (Turn& turn : turns_) {
    if (!turn.enabled || asked_first(turn)) continue;
    if (&turn == chosen) {
      turn.probe_after_tokens = kFirstProbe;
      turn.idle_tokens = 0;
      EDGE_TRY(ask(turn, context, context.wants_distributions ? best.depth : kDeepest, best.rate, true));
    } else if (probes(turn, reading_ms(turn, turn.drafter->lag(context.text)))) {
      EDGE_TRY(ask(turn, context, kProbeDepth, plain_rate, false));
    }
  }
  return {};
}

// A text that the model would write: rows that share experts or neurons cost what those of drafts do. As long as time
// allows, and at least two tokens.
Result<std::vector<int32_t>> Speculator::own_text(KvCache& kv, double until_ms) {
  Decoder& decoder = engine_.decoder();
  const int64_t vocab = decoder.config().vocab_size, most = std::min(engine_.options().context, 2 * kMeasureRows);
  SamplingConfig config;
  config.top_k = kOwnTextTopK;
  Sampler sampler(config, vocab, &engine_.budget());
  std::vector<int32_t> tokens{static_cast<int32_t>(std::min<int64_t>(1, vocab - 1))};
  while (static_cast<int64_t>(tokens.size()) < most && (tokens.size() < 2 || now_ms() < until_ms)) {
    const int32_t parent = -1, row = 0;
    EDGE_TRY(decoder.forward({{&tokens.back(), 1}, {&parent, 1}}, kv));
    const Status status = decoder.logits({&row, 1}, [&](size_t, std::span<float> logits) -> Status {
      EDGE_ASSIGN(const SampledToken token, sampler.sample(logits, tokens, tokens.size()));
      tokens.push_back(token.token);
      return {};
    });
    if (!status.ok()) {
      kv.rollback();
      engine_.store().rewind();
      return status;
    }
    decoder.commit_all(kv);
  }
  return tokens;
}

Status Speculator::measure() {
  const EngineOptions& options = engine_.options();
  const bool in_memory = options.plan.stream_order.empty() && options.plan.demand_bytes == 0;
  if (!in_memory || engine_.store().stats().resident_bytes > kMeasureBytes) return {};
  Decoder& decoder = engine_.decoder();
  const double start = now_ms();
  KvCache kv(engine_.kv_pool());
  EDGE_ASSIGN(const std::vector<int32_t> tokens, own_text(kv, start + kMeasureMs / 2));
  const int64_t most = std::min({decoder.max_rows(), static_cast<int64_t>(tokens.size()), kMeasureRows});
  kv.truncate(static_cast<int64_t>(tokens.size()) - most);
  const std::span<const int32_t> last = std::span(tokens).last(static_cast<size_t>(most));
  std::vector<int32_t> rows(last.size()), parents(last.size());
  std::iota(rows.begin(), rows.end(), 0);
  std::iota(parents.begin(), parents.end(), -1);
  const auto pass = [&](size_t n) -> Result<double> {
    const double begin = now_ms();
    EDGE_TRY(decoder.forward({last.first(n), std::span(parents).first(n)}, kv));
    const Status status = decoder.logits(std::span(rows).first(n), [](size_t, std::span<float>) { return Status(); });
    kv.rollback();
    engine_.store().rewind();
    EDGE_TRY(status);
    return now_ms() - begin;
  };
  // One row whatever it takes: without it the controller knows nothing.
  for (int64_t n = 1; n <= most && (n == 1 || now_ms() - start < kMeasureMs); n *= 2) {
    double least = 0;
    for (int i = 0; i < 3; ++i) {
      EDGE_ASSIGN(const double ms, pass(static_cast<size_t>(n)));
      least = i == 0 ? ms : std::min(least, ms);
    }
    controller_.cost.record(n, least);
  }

  SamplingConfig config;
  config.temperature = 0;
  Sampler sampler(config, decoder.config().vocab_size, &engine_.budget());
  const std::vector<float> hidden(static_cast<size_t>(decoder.config().hidden_size), 1.0f);
  DraftContext context;
  context.text = tokens;
  context.sampler = &sampler;
  context.hidden = hidden;
  for (Turn& turn : turns_) {
    if (turn.drafter->is_free() || most < 8) continue;
    for (int i = 0; i < 2 && now_ms() - start < 2 * kMeasureMs; ++i) {
      turn.drafter->restart();
      turn.guess.forget();  // the first time is a cold one
      turn.read.forget();
      tree_.reset(tokens.back(), {most, 4, static_cast<int32_t>(decoder.config().vocab_size)});
      const double begin = now_ms();
      EDGE_TRY(turn.drafter->read(context));
      turn.read.record((now_ms() - begin) / static_cast<double>(tokens.size()));
      EDGE_TRY(ask(turn, context, 4, 0, true));
    }
    turn.drafter->restart();
    turn.stats.ms = 0;
  }
  tree_.reset(0, {});
  controller_.forget_account();
  revision_ = 0;
  return {};
}

Result<std::vector<SampledToken>> Speculator::step(Sequence& sequence, Sampler& sampler, const VerifyLimits& limits) {
  EDGE_TRY(engine_.ready());
  follow(sequence);
  const int64_t n_tokens = static_cast<int64_t>(sequence.tokens().size());
  const int64_t room = std::min(limits.max_tokens, engine_.options().context - n_tokens);
  const bool decodes = sequence.n_pending() == 1;
  if (!decodes || room < 2 || turns_.empty()) return plain(sequence, sampler, decodes);
  const bool always = std::any_of(turns_.begin(), turns_.end(), [](const Turn& t) { return t.enabled && t.always; });
  // On a model whose passes take microseconds even asking for guesses is dear.
  if (options_.depth == 0 && !always && !controller_.may_spend(0)) return plain(sequence, sampler, decodes);

  const auto settle = [&](int64_t n, double ms, double likely_ms) {
    if (options_.depth > 0 || always) controller_.note(n, ms);
    else controller_.account(n, ms, likely_ms);
  };
  const double asked = now_ms();
  invested_ms_ = unlikely_ms_ = 0;
  DraftTree::Limits tree_limits;
  tree_limits.max_nodes = std::min({options_.max_rows, engine_.decoder().max_rows(), PassCost::kMaxRows,
                                    engine_.options().context - n_tokens + 1});
  tree_limits.max_depth = room - 1;
  tree_limits.vocab_size = static_cast<int32_t>(engine_.decoder().config().vocab_size);
  tree_.reset(sequence.tokens().back(), tree_limits);
  EDGE_TRY(propose(sequence, sampler, room));
  proposed_ = tree_;
  if (options_.depth == 0) controller_.prune(tree_);

  std::vector<SampledToken> tokens;
  const double start = now_ms();
  const double draft_ms = start - asked - invested_ms_;
  if (tree_.size() == 1) {
    EDGE_ASSIGN(tokens, plain(sequence, sampler, true));
    settle(0, draft_ms, draft_ms - unlikely_ms_);
  } else {
    bool wants_best = false;
    for (const Turn& turn : turns_) wants_best = wants_best || (turn.enabled && turn.drafter->wants_best());
    const std::unique_ptr<Acceptor> acceptor = make_acceptor(sampler);
    VerifyLimits within = limits;
    within.max_tokens = room;
    EDGE_ASSIGN(Verified verified, sequence.verify(tree_, *acceptor, within, wants_best));
    const double ms = now_ms() - start;
    controller_.cost.record(tree_.size(), ms);
    if (controller_.cost.known()) {
      const double likely = likely_ms(ms, controller_.cost(tree_.size())) + draft_ms - unlikely_ms_;
      settle(static_cast<int64_t>(verified.tokens.size()), ms + draft_ms, likely);
    }
    count(tree_, verified);
    for (Turn& turn : turns_) {
      if (turn.enabled) turn.drafter->observe({tree_, verified.path, verified.best});
    }
    tokens = std::move(verified.tokens);
  }
  const double end = now_ms();
  std::vector<int32_t> ids;
  for (const SampledToken& token : tokens) ids.push_back(token.token);
  controller_.learn(proposed_, ids);
  const double learning_ms = now_ms() - end;
  settle(0, learning_ms, learning_ms);
  return tokens;
}

std::unique_ptr<Acceptor> Speculator::make_acceptor(Sampler& sampler) const {
  switch (options_.acceptance) {
    case AcceptRule::kRejection: return std::make_unique<RejectionAcceptor>(sampler);
    case AcceptRule::kTypical: return std::make_unique<TypicalAcceptor>(sampler, options_.epsilon, options_.delta);
    case AcceptRule::kCoupling: break;
  }
  return std::make_unique<CouplingAcceptor>(sampler);
}

void Speculator::count(const DraftTree& tree, const Verified& verified) {
  ++stats_.passes;
  stats_.tokens += static_cast<int64_t>(verified.tokens.size());
  const auto owner = [&](uint8_t source) -> DrafterStats& {
    size_t i = turns_.size() - 1;
    while (turns_[i].drafter->first_source() > source) --i;
    return turns_[i].stats;
  };
  for (size_t step = 0; step < verified.path.size(); ++step) {
    for (int32_t node = verified.path[step] + 1; node < tree.size(); ++node) {
      if (tree.parents()[static_cast<size_t>(node)] != verified.path[step]) continue;
      DrafterStats& stats = owner(tree.source(node));
      ++stats.tried;
      if (tree.tokens()[static_cast<size_t>(node)] == verified.tokens[step].token) ++stats.accepted;
    }
  }
}

SpeculationStats Speculator::stats() const {
  SpeculationStats stats = stats_;
  for (const Turn& turn : turns_) stats.drafters.push_back(turn.stats);
  stats.saved_ms = controller_.saved_ms();
  for (int64_t rows : {1, 2, 3, 4, 6, 8, 12, 16, 32, 64}) {
    if (controller_.cost.known()) stats.pass_ms.emplace_back(rows, controller_.cost(rows));
  }
  return stats;
}

}  // namespace edge
