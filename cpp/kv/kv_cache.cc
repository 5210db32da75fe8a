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
  EDGE_TRY(stage_tail(n_rows));
  n_staged_ = n_rows;
  return {};
}

Status KvCache::stage_tail(int64_t n_rows) {
  if (!pool_->shape().has_tail()) return {};
  cut_tail();
  const int64_t n_blocks = (n_committed_ + n_rows + KvShape::kTailTokens - 1) / KvShape::kTailTokens - tail_block_;
  while (static_cast<int64_t>(tail_.size()) < n_blocks) {
    const int32_t frame = pool_->take_tail();
    if (frame < 0) {
      return error(Code::kContextOverflow, "kv cache: no room for the last tokens of one more text: %lld blocks of %lld "
                   "tokens are all in use", static_cast<long long>(pool_->n_tails()),
                   static_cast<long long>(KvShape::kTailTokens));
    }
    tail_.push_back(frame);
  }
  return {};
}

void KvCache::cut_tail() {
  const int64_t block = n_committed_ / KvShape::kTailTokens;
  const auto kept = block - tail_block_;
  const bool keeps = n_committed_ % KvShape::kTailTokens != 0;
  for (int64_t i = 0; i < static_cast<int64_t>(tail_.size()); ++i) {
    if (i != kept || !keeps) pool_->give_tail(tail_[static_cast<size_t>(i)]);
  }
  if (keeps && !tail_.empty()) tail_ = {tail_[static_cast<size_t>(kept)]};
  else tail_.clear();
  tail_block_ = block;
}

void KvCache::forget_tail() {
  for (const int32_t frame : tail_) pool_->give_tail(frame);
  tail_.clear();
  tail_block_ = -1;  // of no token
  truncate(n_committed_);
}

void KvCache::commit(std::span<const int32_t> path) {
  for (size_t i = 0; i < path.size(); ++i) {
    const int64_t from = n_committed_ + path[i];
    const int64_t to = n_committed_ + static_cast<int64_t>(i);
    if (from == to) continue;
    for (int64_t layer = 0; layer < pool_->shape().n_layers; ++layer) copy_row(layer, from, to);
  }
  n_committed_ += static_cast<int64_t>(path.size());
  n_staged_ = 0;
  cut_tail();
}

void KvCache::copy_row(int64_t layer, int64_t from, int64_t to) {
  const KvShape& shape = pool_->shape();
  if (shape.type == KvType::kF16) {
    std::memcpy(key(layer, to), key(layer, from), shape.row_bytes());
    std::memcpy(value(layer, to), value(layer, from), shape.row_bytes());
    return;
  }
  if (shape.has_tail()) {
    for (const KvHalf half : {kKeys, kValues}) std::memcpy(tail(layer, half, to), tail(layer, half, from), shape.row_bytes());
  }
  const KvTileLayout tile = shape.tile();
  const std::byte *from_keys = group(layer, kKeys, from), *from_values = group(layer, kValues, from);
  std::byte *keys = group(layer, kKeys, to), *values = group(layer, kValues, to);
  for (int64_t at = 0; at < shape.n_tiles() * tile.bytes(); at += tile.bytes()) {
    kv_copy(tile, from_keys + at, from_values + at, from % kKvTileTokens, keys + at, values + at, to % kKvTileTokens);
  }
}

void KvCache::commit_all() {
  n_committed_ += n_staged_;
  n_staged_ = 0;
  cut_tail();
}

void KvCache::rollback() {
  n_staged_ = 0;
  cut_tail();
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
  share_tail(other);
  return {};
}

// Of the other's last tokens a copy, where there is room for one: else fewer tokens are shared.
void KvCache::share_tail(const KvCache& other) {
  if (!pool_->shape().has_tail()) return;
  const int64_t block = n_committed_ / KvShape::kTailTokens;
  if (n_committed_ % KvShape::kTailTokens != 0 && !other.tail_.empty() && other.tail_block_ == block) {
    if (const int32_t frame = pool_->take_tail(); frame >= 0) {
      pool_->copy_tail(other.tail_.front(), frame);
      tail_ = {frame};
      tail_block_ = block;
    }
  }
  truncate(n_committed_);
}

void KvCache::truncate(int64_t n_tokens) {
  n_staged_ = 0;
  if (n_tokens < n_committed_) n_committed_ = n_tokens;
  const int64_t block = n_committed_ / KvShape::kTailTokens;
  const bool known = block >= tail_block_ && block - tail_block_ < static_cast<int64_t>(tail_.size());
  if (pool_->shape().has_tail() && !known) n_committed_ = block * KvShape::kTailTokens;
  cut_tail();
  const auto n_pages = static_cast<size_t>(pool_->shape().pages_for(n_committed_));
  while (pages_.size() > n_pages) {
    pool_->give(pages_.back());
    pages_.pop_back();
  }
}

}  // namespace edge
