// Paged f16 keys and values. Rows of a forward pass are staged behind the committed ones, then committed along a
// path or dropped: a prompt chunk, one token and a token tree are one case.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/status.h"
#include "kv/kv_pool.h"

namespace edge {

// One sequence's view of the pool. Slots [0, n_committed) hold the sequence; staged rows follow in batch order.
class KvCache {
 public:
  explicit KvCache(KvPool& pool);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  KvPool& pool() { return *pool_; }
  int64_t n_committed() const { return n_committed_; }
  int64_t n_staged() const { return n_staged_; }
  const std::vector<KvPage>& pages() const { return pages_; }

  // Makes room for n rows behind the committed ones, in memory; kContextOverflow when the pool has no pages left,
  // kDiskError or kCorrupt when pages that make room, or come back, meet a failing drive. Nothing is staged on error.
  Status stage(int64_t n_rows);
  // Of a slot whose page is in memory: staged ones always are.
  uint16_t* key(int64_t layer, int64_t slot) { return row(layer, kKeys, slot); }
  uint16_t* value(int64_t layer, int64_t slot) { return row(layer, kValues, slot); }
  // Keeps the staged rows named by `path` (batch indices, ascending), in that order; the others are dropped.
  void commit(std::span<const int32_t> path);
  void commit_all();
  void rollback();
  // Becomes the first n_tokens committed to `other`, a cache of the same pool, without copying them: a page is copied
  // when one of those that share it stages rows there. kUnsupported where pages may go to a drive.
  Status share(const KvCache& other, int64_t n_tokens);
  // Forgets everything behind the first n_tokens and returns their pages.
  void truncate(int64_t n_tokens);

 private:
  friend class KvPool;
  int64_t page_tokens() const { return pool_->shape().page_tokens; }
  uint16_t* row(int64_t layer, KvHalf half, int64_t slot) {
    return pool_->rows(pages_[static_cast<size_t>(slot / page_tokens())].frame, layer, half) +
           slot % page_tokens() * pool_->shape().kv_dim;
  }

  KvPool* pool_;
  std::vector<KvPage> pages_;
  int64_t n_committed_ = 0;
  int64_t n_staged_ = 0;
};

}  // namespace edge
