#include "kv/kv_cache.h"

#include <algorithm>
#include <cstring>

namespace edge {

KvCache::KvCache(KvPool& pool) : pool_(&pool) { pool.caches_.push_back(this); }

KvCache::~KvCache() {
  rollback();
  truncate(0);
  std::erase(pool_->caches_, this);
}

Status KvCache::stage(int64_t n_rows) {
  n_staged_ = 0;
  const auto n_pages = static_cast<size_t>(pool_->shape().pages_for(n_committed_ + n_rows));
  while (pages_.size() < n_pages) {
    if (!pool_->take()) {
      return error(Code::kContextOverflow, "kv cache: %lld tokens do not fit; %lld pages of %lld tokens are all in use",
                   static_cast<long long>(n_committed_ + n_rows), static_cast<long long>(pages_.size()),
                   static_cast<long long>(page_tokens()));
    }
    pages_.push_back({});
  }
  EDGE_TRY(pool_->hold(*this, n_committed_ / page_tokens()));
  for (size_t i = static_cast<size_t>(n_committed_ / page_tokens()); i < pages_.size(); ++i) {
    if (pool_->own(pages_[i])) continue;
    return error(Code::kContextOverflow, "kv cache: no page of %lld tokens is left for the copy of a shared one",
                 static_cast<long long>(page_tokens()));
  }
  n_staged_ = n_rows;
  return {};
}

void KvCache::commit(std::span<const int32_t> path) {
  const uint64_t row_bytes = pool_->shape().row_bytes();
  for (size_t i = 0; i < path.size(); ++i) {
    const int64_t from = n_committed_ + path[i];
    const int64_t to = n_committed_ + static_cast<int64_t>(i);
    if (from == to) continue;
    for (int64_t layer = 0; layer < pool_->shape().n_layers; ++layer) {
      std::memcpy(key(layer, to), key(layer, from), row_bytes);
      std::memcpy(value(layer, to), value(layer, from), row_bytes);
    }
  }
  n_committed_ += static_cast<int64_t>(path.size());
  n_staged_ = 0;
}

void KvCache::commit_all() {
  n_committed_ += n_staged_;
  n_staged_ = 0;
}

void KvCache::rollback() {
  n_staged_ = 0;
  if (pool_->stream() != nullptr) pool_->stream()->stop();
}

Status KvCache::share(const KvCache& other, int64_t n_tokens) {
  if (pool_->flash() != nullptr) {
    return error(Code::kUnsupported, "kv cache: expected pages in memory to share, found pages on a drive");
  }
  if (other.pool_ != pool_ || &other == this || n_tokens < 0 || n_tokens > other.n_committed_) {
    return error(Code::kBadArgument, "kv cache: expected 0..%lld tokens of another text to share, found %lld",
                 static_cast<long long>(other.n_committed_), static_cast<long long>(n_tokens));
  }
  truncate(0);
  for (int64_t i = 0; i < pool_->shape().pages_for(n_tokens); ++i) {
    pages_.push_back(other.pages_[static_cast<size_t>(i)]);
    pool_->add_user(pages_.back());
  }
  n_committed_ = n_tokens;
  return {};
}

void KvCache::truncate(int64_t n_tokens) {
  n_staged_ = 0;
  if (n_tokens < n_committed_) n_committed_ = n_tokens;
  const auto n_pages = static_cast<size_t>(pool_->shape().pages_for(n_committed_));
  while (pages_.size() > n_pages) {
    pool_->give(pages_.back());
    pages_.pop_back();
  }
}

}  // namespace edge
