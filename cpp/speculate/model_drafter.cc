#include "speculate/model_drafter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "speculate/rejection.h"

namespace edge {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
// A second guess pays where the first is doubtful.
constexpr double kSure = 0.8;
// Tokens that a draft is drawn from under rejection: any distribution is right, as long as it is the one drawn from.
constexpr size_t kDrawnFrom = 256;
constexpr size_t kDrawnChildren = 2;

}  // namespace

Result<std::unique_ptr<ModelDrafter>> ModelDrafter::create(Decoder& decoder, KvPool& pool, int64_t context,
                                                           int32_t vocab_size, bool is_copy, Budget& budget) {
  std::unique_ptr<ModelDrafter> drafter(new ModelDrafter(decoder, pool, context, vocab_size, is_copy));
  if (decoder.config().vocab_size < vocab_size) {
    EDGE_ASSIGN(drafter->padded_, budget.reserve(static_cast<uint64_t>(vocab_size) * sizeof(float), "speculation"));
  }
  drafter->parents_.resize(static_cast<size_t>(decoder.max_rows()));
  std::iota(drafter->parents_.begin(), drafter->parents_.end(), -1);
  return drafter;
}

double ModelDrafter::prior(int i) const {
  constexpr double kFirst[kLevels] = {0.15, 0.35, 0.5, 0.65, 0.8, 0.92};
  constexpr double kCopy[kLevels] = {0.4, 0.6, 0.75, 0.85, 0.92, 0.97};
  constexpr double kSecond[kLevels] = {0.08, 0.15, 0.25, 0.35, 0.4, 0.4};
  return i >= kLevels ? kSecond[i - kLevels] : is_copy_ ? kCopy[i] : kFirst[i];
}

uint8_t ModelDrafter::source_of(double probability, bool second) const {
  constexpr double kUpTo[kLevels - 1] = {0.2, 0.4, 0.6, 0.8, 0.95};
  int level = 0;
  while (level < kLevels - 1 && probability > kUpTo[level]) ++level;
  return static_cast<uint8_t>(first_source() + level + (second ? kLevels : 0));
}

int64_t ModelDrafter::lag(std::span<const int32_t> text) const {
  const size_t n = std::min({text.size(), tokens_.size()});
  const size_t begin = std::min(static_cast<size_t>(n_agreed_), n);
  const auto differ = std::mismatch(text.begin() + begin, text.begin() + n, tokens_.begin() + begin);
  return static_cast<int64_t>(text.end() - differ.first);
}

// Logits of all that the sampler may draw.
void ModelDrafter::hold(std::span<float> logits) {
  const size_t wanted = static_cast<size_t>(vocab_size_), n = std::min(logits.size(), wanted);
  logits_ = logits.first(n);
  if (n == wanted) return;
  float* all = padded_.as<float>();
  std::copy_n(logits.data(), n, all);
  std::fill(all + n, all + wanted, kMasked);
  logits_ = {all, wanted};
}

Status ModelDrafter::pass(std::span<const int32_t> tokens, bool wants_logits) {
  // A token that the draft model has no row for is read as another: its guesses are the worse for it, nothing else.
  known_.assign(tokens.begin(), tokens.end());
  for (int32_t& token : known_) {
    if (token >= decoder_.config().vocab_size) token = 0;
  }
  EDGE_TRY(decoder_.forward({known_, std::span(parents_).first(known_.size())}, kv_));
  const int32_t last = static_cast<int32_t>(tokens.size()) - 1;
  const Status status = decoder_.logits({&last, wants_logits ? size_t{1} : size_t{0}},
                                        [this](size_t, std::span<float> logits) { return hold(logits), Status(); });
  if (!status.ok()) {
    kv_.rollback();
    return status;
  }
  decoder_.commit_all(kv_);
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  return {};
}

// Brings keys and values to the whole text; what was drafted and came true is kept.
Status ModelDrafter::catch_up(std::span<const int32_t> text, bool wants_logits) {
  const int64_t n = static_cast<int64_t>(text.size());
  // The last token is computed again if need be: its logits are what the first guess is drawn from.
  const int64_t kept = std::min(n - lag(text), n - (wants_logits ? 1 : 0));
  tokens_.resize(static_cast<size_t>(kept));
  kv_.truncate(kept);
  for (int64_t begin = kept; begin < n;) {
    const int64_t rows = std::min(n - begin, decoder_.max_rows());
    EDGE_TRY(pass(text.subspan(static_cast<size_t>(begin), static_cast<size_t>(rows)), wants_logits && begin + rows == n));
    begin += rows;
  }
  n_agreed_ = n;
  return {};
}

Status ModelDrafter::read(const DraftContext& context) {
  const int64_t n = static_cast<int64_t>(context.text.size());
  if (n < 2 || n > context_) return {};
  return catch_up(context.text.first(context.text.size() - 1), false);
}

// Whether a second guess beside one that is reached so often and is so doubtful could be worth its row.
bool ModelDrafter::second_pays(const DraftContext& context, int64_t depth, double reach) const {
  if (context.acceptance == nullptr) return false;
  double rate = 0;
  for (int level = kLevels; level < 2 * kLevels; ++level) {
    rate = std::max(rate, context.acceptance->rate(static_cast<uint8_t>(first_source() + level), depth));
  }
  return reach * rate >= context.least_reach;
}

Status ModelDrafter::add_sampled(const DraftContext& context, const Place& at, DraftTree& tree, int32_t* next) {
  EDGE_ASSIGN(const SampledToken first, sampler_->sample(logits_, tokens_, tokens_.size()));
  const double share = rough_share(logits_, first.token);
  *next = tree.add(at.node, first.token, source_of(share, false));
  if (*next < 0 || share > kSure || !second_pays(context, at.depth, at.reach)) return {};
  float& logit = logits_[static_cast<size_t>(first.token)];
  const float first_logit = std::exchange(logit, kMasked);
  const auto second = sampler_->sample(logits_, tokens_, tokens_.size());
  // A bias or a filter may leave the first alone.
  if (!second.ok()) return {};
  const float below = logits_[static_cast<size_t>(second->token)] - first_logit;
  // Of what is left.
  const double second_share = share * std::exp(static_cast<double>(below)) / (1 - share);
  tree.add(at.node, second->token, source_of(second_share, true));
  return {};
}

Status ModelDrafter::add_drawn(const DraftContext& context, const Place& at, DraftTree& tree, int32_t* next) {
  EDGE_ASSIGN(std::span<TokenProbability> all, sampler_->distribution(logits_, tokens_, tokens_.size()));
  const size_t n = std::min(all.size(), kDrawnFrom);
  std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(n), all.end(), [](const auto& a, const auto& b) {
    return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
  });
  std::vector<TokenProbability> q(all.begin(), all.begin() + static_cast<ptrdiff_t>(n));
  std::sort(q.begin(), q.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  double total = 0;
  for (const TokenProbability& one : q) total += one.probability;
  for (TokenProbability& one : q) one.probability /= total;
  const size_t n_children = context.acceptance == nullptr ? 1 : kDrawnChildren;
  const std::vector<int32_t> tokens = draw_without_replacement(q, n_children, sampler_->config().seed, tokens_.size());
  tree.set_distribution(at.node, std::move(q));
  // One source for all of a kind: what is verified must not depend on what was drawn.
  *next = -1;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int source = first_source() + kLevels / 2 + (i > 0 ? kLevels : 0);
    const int32_t child = tree.add_drawn(at.node, tokens[i], static_cast<uint8_t>(source));
    if (child < 0) break;
    if (i == 0) *next = child;
  }
  return {};
}

Status ModelDrafter::propose(const DraftContext& context, DraftTree& tree) {
  const int64_t n = static_cast<int64_t>(context.text.size());
  const int64_t depth = std::min({context.depth, tree.limits().max_depth, context_ - n});
  if (depth < 1) return {};
  if (sampler_ == nullptr || !(context.sampler->config() == config_)) {
    config_ = context.sampler->config();
    SamplingConfig quiet = config_;
    quiet.n_logprobs = -1;
    sampler_ = std::make_unique<Sampler>(std::move(quiet), vocab_size_);
  }
  EDGE_TRY(catch_up(context.text, true));
  for (Place at{0, 1, 1};; ++at.depth) {
    int32_t next = -1;
    EDGE_TRY(context.wants_distributions ? add_drawn(context, at, tree, &next) : add_sampled(context, at, tree, &next));
    if (next < 0 || at.depth == depth) return {};
    if (context.acceptance != nullptr && !context.wants_distributions) {
      at.reach *= context.acceptance->rate(tree.source(next), at.depth);
      if (at.reach < context.least_reach) return {};
    }
    at.node = next;
    const int32_t token = tree.tokens()[static_cast<size_t>(next)];
    EDGE_TRY(pass({&token, 1}, true));
  }
}

}  // namespace edge
