// Paged f16 keys and values. Rows of a forward pass are staged behind the committed ones, then committed along a
// path or dropped: a prompt chunk, one token and a token tree are one case.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/budget.h"
#include "core/status.h"

namespace edge {

struct KvShape {
  int64_t n_layers = 0;
  int64_t kv_dim = 0;  // n_kv_heads * head_dim
  int64_t page_tokens = 64;

  uint64_t row_bytes() const { return static_cast<uint64_t>(kv_dim) * 2; }                   // one key, f16
  uint64_t page_bytes() const { return row_bytes() * 2 * n_layers * page_tokens; }           // keys and values
  uint64_t pages_for(int64_t tokens) const { return (tokens + page_tokens - 1) / page_tokens; }
};

// All pages of an engine, reserved at once so that a context that was accepted can always be filled.
class KvPool {
 public:
  static Result<std::unique_ptr<KvPool>> create(const KvShape& shape, int64_t capacity_tokens, Budget& budget);

  const KvShape& shape() const { return shape_; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  // -1 when no page is left.
  int32_t take_page();
  void give_page(int32_t page) { free_.push_back(page); }
  // [token_in_page][kv_dim] of one layer's keys (or values) in one page.
  uint16_t* keys(int32_t page, int64_t layer) { return base(page) + layer * layer_stride(); }
  uint16_t* values(int32_t page, int64_t layer) { return keys(page, layer) + layer_stride() / 2; }

 private:
  uint16_t* base(int32_t page) { return memory_.as<uint16_t>() + page * (shape_.page_bytes() / 2); }
  int64_t layer_stride() const { return 2 * shape_.page_tokens * shape_.kv_dim; }

  KvShape shape_;
  Block memory_;
  std::vector<int32_t> free_;
};

// One sequence's view of the pool. Slots [0, n_committed) hold the sequence; staged rows follow in batch order.
class KvCache {
 public:
  explicit KvCache(KvPool& pool) : pool_(&pool) {}
  ~KvCache() { truncate(0); }
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t n_committed() const { return n_committed_; }
  int64_t n_staged() const { return n_staged_; }

  // Makes room for n rows behind the committed ones; kContextOverflow when the pool has no pages left.
  Status stage(int64_t n_rows);
  uint16_t* key(int64_t layer, int64_t slot) {
    return pool_->keys(pages_[slot / page_tokens()], layer) + slot % page_tokens() * pool_->shape().kv_dim;
  }
  uint16_t* value(int64_t layer, int64_t slot) {
    return pool_->values(pages_[slot / page_tokens()], layer) + slot % page_tokens() * pool_->shape().kv_dim;
  }
  // Keeps the staged rows named by `path` (batch indices, ascending), in that order; the others are dropped.
  void commit(std::span<const int32_t> path);
  void commit_all();
  void rollback() { n_staged_ = 0; }
  // Forgets everything behind the first n_tokens and returns their pages.
  void truncate(int64_t n_tokens);

 private:
  int64_t page_tokens() const { return pool_->shape().page_tokens; }

  KvPool* pool_;
  std::vector<int32_t> pages_;
  int64_t n_committed_ = 0;
  int64_t n_staged_ = 0;
};

}  // namespace edge
