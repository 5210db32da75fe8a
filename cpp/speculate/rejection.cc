#include "speculate/rejection.h"

#include <algorithm>
#include <limits>

#include "sample/philox.h"
#include "sample/portable_math.h"

namespace edge {
namespace {

double total_of(std::span<const TokenProbability> p) {
  double total = 0;
  for (const TokenProbability& one : p) total += one.probability;
  return total;
}

void scale(std::span<TokenProbability> p, double total) {
  for (TokenProbability& one : p) one.probability /= total;
}

double at(std::span<const TokenProbability> p, int32_t token) {
  const auto found = std::lower_bound(p.begin(), p.end(), token,
                                      [](const TokenProbability& one, int32_t id) { return one.token < id; });
  return found != p.end() && found->token == token ? found->probability : 0;
}

void remove(std::span<TokenProbability> p, int32_t token) {
  for (TokenProbability& one : p) {
    if (one.token == token) one.probability = 0;
  }
}

int32_t pick(std::span<const TokenProbability> p, double u) {
  double left = u * total_of(p);
  int32_t last = -1;
  for (const TokenProbability& one : p) {
    if (!(one.probability > 0)) continue;
    last = one.token;
    left -= one.probability;
    if (left < 0) break;
  }
  return last;
}

}  // namespace

std::vector<int32_t> draw_without_replacement(std::span<const TokenProbability> q, size_t n, uint64_t seed,
                                              uint64_t position) {
  // The first n of a race of exponential clocks at rates q come in the order of draws without replacement.
  std::vector<std::pair<double, int32_t>> finish;
  for (const TokenProbability& one : q) {
    if (!(one.probability > 0)) continue;
    const double u = philox_uniform(seed, position, one.token, Purpose::kDraft);
    finish.emplace_back(exponential(u) / one.probability, one.token);
  }
  n = std::min(n, finish.size());
  std::partial_sort(finish.begin(), finish.begin() + static_cast<ptrdiff_t>(n), finish.end());
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < n; ++i) tokens.push_back(finish[i].second);
  return tokens;
}

int32_t draw_by_rejection(std::span<TokenProbability> p, std::span<const TokenProbability> drawn_from,
                          std::span<const int32_t> drawn, std::span<const int32_t> guesses, uint64_t seed,
                          uint64_t position) {
  std::vector<TokenProbability> q(drawn_from.begin(), drawn_from.end());
  int32_t trial = 0;
  const auto uniform = [&] { return philox_uniform(seed, position, trial++, Purpose::kAccept); };
  for (const int32_t token : drawn) {
    const double q_token = at(q, token);
    if (uniform() * q_token < at(p, token)) return token;
    size_t i = 0;
    for (const TokenProbability& one : q) {
      while (i < p.size() && p[i].token < one.token) ++i;
      if (i < p.size() && p[i].token == one.token) p[i].probability = std::max(0.0, p[i].probability - one.probability);
    }
    const double rest = total_of(p);
    // p and q agree but for rounding: any token that was not drawn is as good.
    if (!(rest > 0)) return token;
    scale(p, rest);
    remove(q, token);
    const double left = total_of(q);
    if (!(left > 0)) break;  // q was this token alone: nothing else was drawn from it
    scale(q, left);
  }
  for (const int32_t token : guesses) {
    const double p_token = at(p, token);
    if (uniform() < p_token) return token;
    remove(p, token);
    const double rest = total_of(p);
    if (!(rest > 0)) return token;
    scale(p, rest);
  }
  return pick(p, philox_uniform(seed, position, 0, Purpose::kResidual));
}

Result<SampledToken> RejectionAcceptor::draw(const DraftTree& tree, int32_t node, std::span<float> logits,
                                             std::span<const int32_t> text) {
  const uint64_t position = text.size();
  EDGE_ASSIGN(const std::span<TokenProbability> p, sampler_.distribution(logits, text, position));
  const DraftTree::Drawn* source = tree.drawn(node);
  std::vector<int32_t> drawn, guesses;
  if (source != nullptr) {
    for (const int32_t child : source->children) drawn.push_back(tree.tokens()[static_cast<size_t>(child)]);
  }
  for (int32_t child = node + 1; child < tree.size(); ++child) {
    const int32_t token = tree.tokens()[static_cast<size_t>(child)];
    if (tree.parents()[static_cast<size_t>(child)] != node) continue;
    if (std::find(drawn.begin(), drawn.end(), token) == drawn.end()) guesses.push_back(token);
  }
  const std::span<const TokenProbability> q =
      source == nullptr ? std::span<const TokenProbability>() : std::span<const TokenProbability>(source->q);
  const int32_t token = draw_by_rejection(p, q, drawn, guesses, sampler_.config().seed, position);
  return sampler_.report(logits, token, position);
}

Result<SampledToken> TypicalAcceptor::draw(const DraftTree& tree, int32_t node, std::span<float> logits,
                                           std::span<const int32_t> text) {
  const uint64_t position = text.size();
  EDGE_ASSIGN(const std::span<TokenProbability> p, sampler_.distribution(logits, text, position));
  double entropy = 0;
  for (const TokenProbability& one : p) {
    if (one.probability > 0) entropy -= one.probability * portable_log(one.probability);
  }
  const double least = std::min(epsilon_, delta_ * portable_exp(-entropy));
  int32_t best = -1;
  double best_probability = least;
  for (int32_t child = node + 1; child < tree.size(); ++child) {
    if (tree.parents()[static_cast<size_t>(child)] != node) continue;
    const int32_t token = tree.tokens()[static_cast<size_t>(child)];
    const double probability = at(p, token);
    if (probability > best_probability) {
      best = token;
      best_probability = probability;
    }
  }
  if (best >= 0) return sampler_.report(logits, best, position);
  return sampler_.sample(logits, text, position);
}

}  // namespace edge
