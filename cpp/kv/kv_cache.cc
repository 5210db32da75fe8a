#include "kv/kv_cache.h"

#include <cstring>

namespace edge {

Result<std::unique_ptr<KvPool>> KvPool::create(const KvShape& shape, int64_t capacity_tokens, Budget& budget) {
  auto pool = std::make_unique<KvPool>();
  pool->shape_ = shape;
  const int64_t n_pages = static_cast<int64_t>(shape.pages_for(capacity_tokens));
  EDGE_ASSIGN(pool->memory_, budget.reserve(n_pages * shape.page_bytes(), "kv cache"));
  for (int64_t page = n_pages; page-- > 0;) pool->free_.push_back(static_cast<int32_t>(page));
  return pool;
}

int32_t KvPool::take_page() {
  if (free_.empty()) return -1;
  const int32_t page = free_.back();
  free_.pop_back();
  return page;
}

Status KvCache::stage(int64_t n_rows) {
  const int64_t n_pages = static_cast<int64_t>(pool_->shape().pages_for(n_committed_ + n_rows));
  while (static_cast<int64_t>(pages_.size()) < n_pages) {
    const int32_t page = pool_->take_page();
    if (page < 0) {
      return error(Code::kContextOverflow, "kv cache: %lld tokens do not fit; %lld pages of %lld tokens are all in use",
                   static_cast<long long>(n_committed_ + n_rows), static_cast<long long>(pages_.size()),
                   static_cast<long long>(page_tokens()));
    }
    pages_.push_back(page);
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

void KvCache::truncate(int64_t n_tokens) {
  n_staged_ = 0;
  if (n_tokens < n_committed_) n_committed_ = n_tokens;
  const size_t n_pages = pool_->shape().pages_for(n_committed_);
  while (pages_.size() > n_pages) {
    pool_->give_page(pages_.back());
    pages_.pop_back();
  }
}

}  // namespace edge
