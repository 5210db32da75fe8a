#include "engine/speculator.h"

#include <algorithm>
#include <chrono>

namespace edge {
namespace {

constexpr int64_t kLongestProbe = 2048;
constexpr int64_t kProbeDepth = 2;
// Until a drafter's time was measured, as a share of a plain pass.
constexpr double kDraftPrior = 0.1;
constexpr double kFresh = 0.2;

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void Speculator::add(std::unique_ptr<Drafter> drafter) {
  drafter->set_first_source(n_sources_);
  for (int i = 0; i < drafter->n_sources(); ++i) controller_.acceptance.set_prior(n_sources_++, drafter->prior(i));
  Turn turn;
  turn.stats.name = drafter->name();
  turn.drafter = std::move(drafter);
  turns_.push_back(std::move(turn));
}

void Speculator::follow(Sequence& sequence) {
  if (revision_ == sequence.revision()) return;
  revision_ = sequence.revision();
  for (Turn& turn : turns_) {
    turn.drafter->restart();
    if (turn.drafter->wants_hidden()) sequence.keep_hidden();
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

// How deep this drafter's guesses may be worth its time, as things are.
int64_t Speculator::depth_for(Turn& turn) const {
  if (options_.depth > 0) return options_.depth;
  constexpr int64_t kDeepest = Acceptance::kMaxDepth;
  if (turn.drafter->is_free()) return kDeepest;
  if (!controller_.may_spend()) return 0;
  const double ms = turn.ms_per_depth > 0 ? turn.ms_per_depth : kDraftPrior * controller_.cost(1);
  return controller_.chain_depth(turn.drafter->first_source(), ms, kDeepest);
}

Status Speculator::propose(Sequence& sequence, Sampler& sampler) {
  DraftContext context;
  context.text = sequence.tokens();
  context.sampler = &sampler;
  context.hidden = sequence.hidden();
  for (Turn& turn : turns_) {
    turn.ms = 0;
    context.depth = depth_for(turn);
    if (context.depth == 0) {
      if (++turn.idle_tokens < turn.probe_after_tokens || !controller_.may_spend()) continue;
      turn.probe_after_tokens = std::min(2 * turn.probe_after_tokens, kLongestProbe);
      for (int i = 0; i < turn.drafter->n_sources(); ++i) controller_.acceptance.fade(turn.drafter->first_source() + i);
      context.depth = kProbeDepth;
    } else if (!turn.drafter->is_free()) {
      turn.probe_after_tokens = 64;
    }
    turn.idle_tokens = 0;
    const bool lags = turn.drafter->lag(context.text) > 32;
    const double start = now_ms();
    EDGE_TRY(turn.drafter->propose(context, tree_));
    const double ms = now_ms() - start;
    turn.stats.ms += ms;
    if (lags) continue;  // reading a prompt is not the price of a guess
    turn.ms = ms;
    const double per_depth = ms / static_cast<double>(context.depth);
    turn.ms_per_depth += (turn.ms_per_depth > 0 ? kFresh : 1.0) * (per_depth - turn.ms_per_depth);
  }
  return {};
}

Result<std::vector<SampledToken>> Speculator::step(Sequence& sequence, Sampler& sampler, const VerifyLimits& limits) {
  follow(sequence);
  const int64_t n_tokens = static_cast<int64_t>(sequence.tokens().size());
  const int64_t room = std::min(limits.max_tokens, engine_.options().context - n_tokens);
  const bool decodes = sequence.n_pending() == 1;
  if (!decodes || room < 2 || turns_.empty()) return plain(sequence, sampler, decodes);
  if (options_.depth == 0 && !controller_.cost.known()) return plain(sequence, sampler, decodes);

  DraftTree::Limits tree_limits;
  tree_limits.max_nodes = std::min({options_.max_rows, engine_.decoder().max_rows(), PassCost::kMaxRows,
                                    engine_.options().context - n_tokens + 1});
  tree_limits.max_depth = room - 1;
  tree_limits.vocab_size = static_cast<int32_t>(engine_.decoder().config().vocab_size);
  tree_.reset(sequence.tokens().back(), tree_limits);
  EDGE_TRY(propose(sequence, sampler));
  double draft_ms = 0;
  for (const Turn& turn : turns_) draft_ms += turn.ms;
  proposed_ = tree_;
  if (options_.depth == 0) {
    if (controller_.may_spend()) controller_.prune(tree_);
    else tree_.keep(std::vector<bool>(static_cast<size_t>(tree_.size()), false));
  }

  std::vector<SampledToken> tokens;
  const double start = now_ms();
  if (tree_.size() == 1) {
    EDGE_ASSIGN(tokens, plain(sequence, sampler, true));
    if (draft_ms > 0) controller_.account(0, draft_ms);
  } else {
    bool wants_best = false;
    for (const Turn& turn : turns_) wants_best = wants_best || turn.drafter->wants_best();
    CouplingAcceptor acceptor(sampler);
    VerifyLimits within = limits;
    within.max_tokens = room;
    EDGE_ASSIGN(Verified verified, sequence.verify(tree_, acceptor, within, wants_best));
    const double ms = now_ms() - start;
    controller_.cost.record(tree_.size(), ms);
    if (controller_.cost.known()) controller_.account(static_cast<int64_t>(verified.tokens.size()), ms + draft_ms);
    count(tree_, verified);
    for (Turn& turn : turns_) turn.drafter->observe({tree_, verified.path, verified.best});
    tokens = std::move(verified.tokens);
  }
  std::vector<int32_t> ids;
  for (const SampledToken& token : tokens) ids.push_back(token.token);
  controller_.learn(proposed_, ids);
  return tokens;
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
