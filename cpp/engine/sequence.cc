#include "engine/sequence.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

namespace edge {
namespace {

uint64_t next_revision() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

Result<std::unique_ptr<Sequence>> Sequence::create(Engine& engine) {
  std::unique_ptr<Sequence> sequence(new Sequence(engine));
  EDGE_TRY(sequence->reserve_logits());
  return sequence;
}

Status Sequence::reserve_logits() {
  if (logits_.data() != nullptr) return {};
  const uint64_t bytes = static_cast<uint64_t>(engine_.decoder().config().vocab_size) * sizeof(float);
  EDGE_ASSIGN(logits_, engine_.budget().reserve(bytes, "logits"));
  return {};
}

Result<int64_t> Sequence::set_tokens(std::vector<int32_t> tokens) {
  const int64_t n = static_cast<int64_t>(tokens.size()), context = engine_.options().context;
  if (n < 1) return error(Code::kBadArgument, "prompt: expected at least one token, found none");
  if (n > context) {
    return error(Code::kContextOverflow, "prompt of %lld tokens does not fit the context of %lld tokens",
                 static_cast<long long>(n), static_cast<long long>(context));
  }
  const auto differ = std::mismatch(tokens.begin(), tokens.end(), tokens_.begin(), tokens_.end());
  // At least the last token is computed again: its logits are what the next token is drawn from.
  const int64_t kept = std::min({static_cast<int64_t>(differ.first - tokens.begin()), kv_.n_committed(), n - 1});
  kv_.truncate(kept);
  tokens_ = std::move(tokens);
  forget_pass();
  return kv_.n_committed();
}

void Sequence::forget_pass() {
  has_logits_ = false;
  hidden_.clear();
  revision_ = next_revision();
}

Status Sequence::remember_hidden(int32_t row) {
  if (!keeps_hidden_) return {};
  hidden_.resize(static_cast<size_t>(engine_.decoder().config().hidden_size));
  return engine_.decoder().hidden(row, hidden_);
}

Status Sequence::pass(bool every_row, const OnRow& on_row) {
  EDGE_TRY(engine_.ready());
  Decoder& decoder = engine_.decoder();
  const int64_t begin = kv_.n_committed();
  const int64_t n_rows = std::min(n_pending(), decoder.max_rows());
  std::vector<int32_t> parents(static_cast<size_t>(n_rows));
  std::iota(parents.begin(), parents.end(), -1);
  EDGE_TRY(decoder.forward({{tokens_.data() + begin, static_cast<size_t>(n_rows)}, parents}, kv_));
  std::vector<int32_t> rows;
  if (every_row) {
    rows.resize(static_cast<size_t>(n_rows));
    std::iota(rows.begin(), rows.end(), 0);
  } else if (begin + n_rows == static_cast<int64_t>(tokens_.size())) {
    rows.push_back(static_cast<int32_t>(n_rows - 1));
  }
  Status status = decoder.logits(
      rows, [&](size_t i, std::span<float> logits) { return on_row(begin + rows[i], logits); });
  if (status.ok()) status = remember_hidden(static_cast<int32_t>(n_rows - 1));
  if (!status.ok()) {
    kv_.rollback();
    engine_.store().rewind();
    return status;
  }
  decoder.commit_all(kv_);
  return {};
}

Status Sequence::advance() {
  if (n_pending() == 0) return {};
  EDGE_TRY(reserve_logits());
  return pass(false, [&](int64_t, std::span<float> logits) -> Status {
    std::memcpy(logits_.data(), logits.data(), logits.size_bytes());
    has_logits_ = true;
    return {};
  });
}

Result<SampledToken> Sequence::next(Sampler& sampler) {
  if (static_cast<int64_t>(tokens_.size()) >= engine_.options().context) {
    return error(Code::kContextOverflow, "token %zu does not fit the context of %lld tokens", tokens_.size() + 1,
                 static_cast<long long>(engine_.options().context));
  }
  while (n_pending() > 0) EDGE_TRY(advance());
  if (!has_logits_) return error(Code::kBadArgument, "next: the sequence holds no tokens");
  const size_t vocab = static_cast<size_t>(engine_.decoder().config().vocab_size);
  EDGE_ASSIGN(SampledToken token, sampler.sample({logits_.as<float>(), vocab}, tokens_, tokens_.size()));
  tokens_.push_back(token.token);
  has_logits_ = false;
  return token;
}

Result<std::vector<float>> Sequence::logits() {
  while (n_pending() > 0) EDGE_TRY(advance());
  if (!has_logits_) return error(Code::kBadArgument, "logits: the sequence holds no tokens");
  const float* data = logits_.as<float>();
  return std::vector<float>(data, data + engine_.decoder().config().vocab_size);
}

Result<std::vector<double>> Sequence::score(std::vector<int32_t> tokens) {
  EDGE_ASSIGN([[maybe_unused]] const int64_t kept, set_tokens(std::move(tokens)));
  kv_.truncate(0);
  std::vector<double> scores;
  while (n_pending() > 0) {
    EDGE_TRY(pass(true, [&](int64_t index, std::span<float> logits) -> Status {
      const size_t next = static_cast<size_t>(index) + 1;
      if (next < tokens_.size()) scores.push_back(log_prob(logits, tokens_[next]));
      return {};
    }));
  }
  return scores;
}

Status Sequence::shift(int64_t keep_first, int64_t keep_last) {
  const int64_t n = static_cast<int64_t>(tokens_.size());
  if (keep_first < 0 || keep_last < 1 || keep_first + keep_last > n) {
    return error(Code::kBadArgument, "shift: expected to keep at most %lld tokens, found %lld and %lld",
                 static_cast<long long>(n), static_cast<long long>(keep_first), static_cast<long long>(keep_last));
  }
  tokens_.erase(tokens_.begin() + keep_first, tokens_.end() - keep_last);
  kv_.truncate(std::min(keep_first, kv_.n_committed()));
  forget_pass();
  return {};
}

Status Sequence::truncate(int64_t n_tokens) {
  if (n_tokens < 1 || n_tokens > static_cast<int64_t>(tokens_.size())) {
    return error(Code::kBadArgument, "truncate: expected 1..%zu tokens, found %lld", tokens_.size(),
                 static_cast<long long>(n_tokens));
  }
  if (n_tokens == static_cast<int64_t>(tokens_.size())) return {};
  tokens_.resize(static_cast<size_t>(n_tokens));
  // As after next(): the pass of the last token is due.
  kv_.truncate(n_tokens - 1);
  forget_pass();
  return {};
}

Result<Verified> Sequence::verify(const DraftTree& tree, Acceptor& acceptor, const VerifyLimits& limits,
                                  bool wants_best) {
  if (n_pending() != 1 || tree.tokens()[0] != tokens_.back()) {
    return error(Code::kBadArgument, "verify: expected a tree below the last token and 1 token pending, found %lld",
                 static_cast<long long>(n_pending()));
  }
  EDGE_TRY(engine_.ready());
  const size_t n_before = tokens_.size();
  auto verified = edge::verify(engine_.decoder(), kv_, tree, acceptor, limits, wants_best, tokens_);
  Status status = verified.status();
  if (status.ok()) status = remember_hidden(verified->path.back());
  if (!status.ok()) {
    tokens_.resize(n_before);
    kv_.rollback();
    engine_.store().rewind();
    return status;
  }
  engine_.decoder().commit(verified->path, kv_);
  has_logits_ = false;
  return verified;
}

}  // namespace edge
