// Paged keys and values: f16, or rounded to 8 or 4 bits as they are staged. Rows of a forward pass are staged behind the committed ones, then committed along a
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
  // Of a slot whose page is in memory: staged ones always are. f16 only.
  uint16_t* key(int64_t layer, int64_t slot) { return row(layer, kKeys, slot); }
  uint16_t* value(int64_t layer, int64_t slot) { return row(layer, kValues, slot); }
  // The keys (or values) of the kKvTileTokens slots that `slot` is one of: KvShape::group_bytes() of them.
  std::byte* group(int64_t layer, KvHalf half, int64_t slot) {
    return pool_->half(pages_[static_cast<size_t>(slot / page_tokens())].frame, layer, half) +
           static_cast<uint64_t>(slot % page_tokens() / kKvTileTokens) * pool_->shape().group_bytes();
  }
  // A row of the tail (KvShape::kTailTokens), f16 [kv_dim]: staged, or of the block that the next token is in.
  uint16_t* tail(int64_t layer, KvHalf half, int64_t slot) {
    const int32_t frame = tail_[static_cast<size_t>(slot / KvShape::kTailTokens - tail_block_)];
    return pool_->tail_rows(frame, layer, half) + slot % KvShape::kTailTokens * pool_->shape().kv_dim;
  }
  // Keeps the staged rows named by `path` (batch indices, ascending), in that order; the others are dropped.
  void commit(std::span<const int32_t> path);
  void commit_all();
  void rollback();
  // Becomes the first n_tokens committed to `other`, a cache of the same pool, without copying them: a page is copied
  // when one of those that share it stages rows there. Fewer become its own where truncate() would leave fewer. kUnsupported where pages may go to a drive.
  Status share(const KvCache& other, int64_t n_tokens);
  // No row of the tail is known any more: fewer tokens stay where one is needed.
  void forget_tail();
  // Forgets everything behind the first n_tokens and returns their pages. Where the tail of that place is gone, what
  // needs it is forgotten as well: fewer tokens stay, down to a multiple of KvShape::kTailTokens.
  void truncate(int64_t n_tokens);

 private:
  friend class KvPool;
  Status stage_tail(int64_t n_rows);
  void share_tail(const KvCache& other);
  // Only the block of the next token stays.
  void cut_tail();
  void copy_row(int64_t layer, int64_t from, int64_t to);
  int64_t page_tokens() const { return pool_->shape().page_tokens; }
  uint16_t* row(int64_t layer, KvHalf half, int64_t slot) {
    return pool_->rows(pages_[static_cast<size_t>(slot / page_tokens())].frame, layer, half) +
           slot % page_tokens() * pool_->shape().kv_dim;
  }

  KvPool* pool_;
  std::vector<KvPage> pages_;
  int64_t n_committed_ = 0;
  int64_t n_staged_ = 0;
  int64_t tail_block_ = 0;      // whose rows tail_ begins with
  std::vector<int32_t> tail_;   // frames of the pool, block after block
};

}  // namespace edge
