#include "speculate/medusa_drafter.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "sample/filters.h"

namespace edge {
namespace {

// Tokens of a head that may be guessed, most likely first.
constexpr int64_t kShortlist = 24;
constexpr size_t kMostNodes = 24;

}  // namespace

int64_t MedusaDrafter::count(const PackDirectory& directory) {
  int64_t n = 0;
  while (n < kMaxHeads && directory.find("medusa." + std::to_string(n) + ".weight") != kNoWeight) ++n;
  return n;
}

Result<std::unique_ptr<MedusaDrafter>> MedusaDrafter::create(Decoder& decoder, const PackDirectory& directory,
                                                             std::unique_ptr<WeightStore> store,
                                                             const Kernels& kernels, ThreadPool& pool,
                                                             Budget& budget) {
  const int64_t n = count(directory), hidden = decoder.config().hidden_size, stride = pad16(hidden);
  if (n == 0) return error(Code::kUnsupported, "medusa: expected entries medusa.0.weight and so on, the pack has none");
  std::unique_ptr<MedusaDrafter> drafter(new MedusaDrafter(decoder, directory, std::move(store), kernels, pool));
  for (int64_t k = 0; k < n; ++k) {
    const std::string name = "medusa." + std::to_string(k);
    const Head head{directory.find(name + ".weight"), directory.find(name + ".bias")};
    const PackEntry& weight = directory.entry(head.weight);
    const bool fits = is_tile_format(weight.format) && weight.rows == hidden && weight.cols == hidden;
    const bool biased = head.bias != kNoWeight && directory.entry(head.bias).format == WeightFormat::kF32Vector &&
                        directory.entry(head.bias).cols == hidden;
    if (!fits || !biased) {
      return error(Code::kBadFile, "pack: %s: expected a matrix of %lld x %lld and a bias, found %lld x %lld%s",
                   name.c_str(), static_cast<long long>(hidden), static_cast<long long>(hidden),
                   static_cast<long long>(weight.rows), static_cast<long long>(weight.cols),
                   biased ? "" : " and no bias that fits");
    }
    drafter->heads_.push_back(head);
  }
  const uint64_t act_bytes = ActRows::bytes(1, hidden);
  const uint64_t floats = static_cast<uint64_t>(stride + 2 * n * stride) * sizeof(float);
  EDGE_ASSIGN(drafter->memory_, budget.reserve(floats + act_bytes, "speculation"));
  drafter->input_ = drafter->memory_.as<float>();
  drafter->states_ = drafter->input_ + stride;
  const std::span<std::byte> acts(drafter->memory_.data() + floats, act_bytes);
  drafter->acts_ = std::make_unique<ActRows>(kernels, pool, acts);
  drafter->tokens_.resize(static_cast<size_t>(n));
  return drafter;
}

double MedusaDrafter::prior(int i) const {
  constexpr double kByRank[kRanks] = {1, 0.25, 0.12, 0.07};
  return 0.55 * std::pow(0.75, i / kRanks) * kByRank[i % kRanks];
}

// The tokens each head would have the sampler draw. Penalties are left out: a guess need not be right.
Status MedusaDrafter::guess(const DraftContext& context, size_t n_heads) {
  const int64_t hidden = decoder_.config().hidden_size, stride = pad16(hidden);
  std::copy_n(context.hidden.data(), hidden, input_);
  acts_->set(input_, stride, 1, hidden);
  for (size_t k = 0; k < n_heads; ++k) {
    const Product product{heads_[k].weight, states_ + static_cast<int64_t>(k) * stride, stride, heads_[k].bias};
    EDGE_TRY(linear_.run(*acts_, {&product, 1}));
  }
  float* states = states_ + static_cast<int64_t>(heads_.size()) * stride;
  for (size_t k = 0; k < n_heads; ++k) {
    const float* gate = states_ + static_cast<int64_t>(k) * stride;
    float* out = states + static_cast<int64_t>(k) * hidden;
    for (int64_t i = 0; i < hidden; ++i) out[i] = input_[i] + gate[i] / (1.0f + std::exp(-gate[i]));
  }
  const SamplingConfig& config = context.sampler->config();
  return decoder_.project(states, static_cast<int64_t>(n_heads), [&](size_t k, std::span<float> logits) -> Status {
    const int64_t n_list = config.top_k > 0 ? std::min(config.top_k, kShortlist) : kShortlist;
    std::vector<Candidate> room(static_cast<size_t>(top_k_room(n_list, static_cast<int64_t>(logits.size()))));
    room.resize(keep_top_k(logits, n_list, room.data()));
    if (config.temperature > 0) {
      const uint64_t position = context.text.size() + k;
      for (Candidate& one : room) {
        one.logit = one.logit / config.temperature + static_cast<float>(gumbel(config.seed, position, one.id));
      }
      std::sort(room.begin(), room.end(), more_likely);
    }
    tokens_[k].clear();
    for (size_t i = 0; i < std::min<size_t>(kRanks, room.size()); ++i) tokens_[k].push_back(room[i].id);
    return {};
  });
}

Status MedusaDrafter::propose(const DraftContext& context, DraftTree& tree) {
  if (context.hidden.empty()) return {};
  const size_t n_heads = std::min({heads_.size(), static_cast<size_t>(context.depth),
                                   static_cast<size_t>(tree.limits().max_depth)});
  if (n_heads == 0) return {};
  EDGE_TRY(guess(context, n_heads));
  const auto source_of = [&](size_t head, size_t rank) {
    return static_cast<uint8_t>(first_source() + head * kRanks + rank);
  };
  if (context.acceptance == nullptr) {
    int32_t node = 0;
    for (size_t k = 0; k < n_heads && node >= 0 && !tokens_[k].empty(); ++k) {
      node = tree.add(node, tokens_[k][0], source_of(k, 0));
    }
    return {};
  }
  // Best first by the probability of being reached: the likeliest tree of its size.
  struct Open {
    double reach;
    int32_t parent;
    size_t head, rank;
  };
  const auto open = [&](double above, int32_t parent, size_t head, size_t rank) {
    const double rate = context.acceptance->rate(source_of(head, rank), static_cast<int64_t>(head) + 1);
    return Open{above * rate, parent, head, rank};
  };
  std::vector<Open> opens;
  const auto expand = [&](double reach, int32_t node, size_t head) {
    if (head >= n_heads) return;
    for (size_t rank = 0; rank < tokens_[head].size(); ++rank) opens.push_back(open(reach, node, head, rank));
  };
  expand(1, 0, 0);
  for (size_t n = 0; n < kMostNodes && !opens.empty(); ++n) {
    const auto best = std::max_element(opens.begin(), opens.end(),
                                       [](const Open& a, const Open& b) { return a.reach < b.reach; });
    const Open chosen = *best;
    opens.erase(best);
    if (chosen.reach < context.least_reach) break;
    const int32_t node = tree.add(chosen.parent, tokens_[chosen.head][chosen.rank], source_of(chosen.head, chosen.rank));
    if (node >= 0) expand(chosen.reach, node, chosen.head + 1);
  }
  return {};
}

}  // namespace edge
