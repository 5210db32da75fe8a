// Attention over keys and values of 8 or 4 bits (kernels/tile_attention.h).
//
// A row's key and value are rounded when they are computed, each by itself, and every row sees them so. In 4 bits,
// queries, keys and values are rotated first, and a row sees those of its own block of KvShape::kTailTokens positions as f16:
// what a row sees of another depends on the two positions alone, so chunks, batches and trees change no bit.
// Tiles hold 16 positions. Rows of a tree stand elsewhere: what such a row sees behind the committed tokens is copied into tiles in
// the order of positions.
#pragma once

#include <functional>
#include <memory>

#include "core/budget.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "model/batch_rows.h"
#include "model/decoder_config.h"

namespace edge {

struct TileAttentionOptions {
  int64_t max_rows = 0;
  int64_t context = 0;
  int64_t score_rows = 0;  // as DecoderOptions has it
};

class TileAttention {
 public:
  static uint64_t bytes(const DecoderConfig& config, const TileAttentionOptions& options, int n_threads);
  // The references must outlive it.
  static Result<std::unique_ptr<TileAttention>> create(const DecoderConfig& config, const TileAttentionOptions& options,
                                                       const Kernels& kernels, ThreadPool& pool, Budget& budget);

  // Takes one staged row: q [q_dim], k and v [kv_dim], after their rotation by position. They are changed. Rows may come
  // from several threads.
  void put(const BatchRows& rows, int64_t layer, int64_t row, float* q, float* k, float* v);
  // out [n_rows][stride] = attention of all rows, which have been put; q [n_rows][stride] as put() left them.
  void attend(const BatchRows& rows, int64_t layer, const float* q, float* out, int64_t stride);
  // The same with keys and values partly in a file, by KvPool::stream(), which was started for whole_tokens().
  Status attend_streamed(const BatchRows& rows, int64_t layer, const float* q, float* out, int64_t stride);
  // Committed tokens that are read through the stream: those of whole tiles.
  static int64_t whole_tokens(int64_t n_committed) { return n_committed / kKvTileTokens * kKvTileTokens; }

 private:
  // One row's view of one KV head: rounded keys [first, end), and as f16 [end, position].
  struct View {
    KvCache* kv = nullptr;
    int64_t layer = 0, row = 0, head = 0;
    int64_t first = 0, end = 0, position = 0;
    int64_t copied = 0;           // from this position on tiles are in `staged`, keys before values
    const std::byte* staged = nullptr;
    // A window may see no rounded key at all.
    int64_t segments_end() const { return first < end ? (end + kKvSegment - 1) / kKvSegment : first / kKvSegment; }
  };
  // Room for one view.
  struct Work {
    int64_t stride = 0;                // scores: of one segment, streamed: of all
    float* scores = nullptr;           // [group][stride]
    float* value_scales = nullptr;     // [stride]
    SegmentSum* segments = nullptr;    // [stride / kKvSegment][group]
    int32_t* sums = nullptr;           // [group][padded]
    AttentionState* state = nullptr;   // [group]
    float* out = nullptr;              // [group][padded]
    const std::byte** tiles = nullptr; // of a segment
    const uint16_t** tail = nullptr;   // rows of keys, of values
    uint64_t bytes = 0;                // all of it
  };

  TileAttention(const DecoderConfig& config, const TileAttentionOptions& options, const Kernels& kernels,
                ThreadPool& pool);
  // Where rows of q and out lie.
  struct Rows {
    const float* q = nullptr;
    float* out = nullptr;
    int64_t stride = 0;
  };

  Work work(std::byte* at) const;
  std::byte* staged_of(int thread) const { return staged_ + thread * 2 * max_staged() * layout_.bytes(); }
  Work work_of(int64_t index) const { return work(works_ + static_cast<uint64_t>(index) * work_bytes_); }
  // Carves everything; with no memory behind it only the sizes count.
  uint64_t carve(std::byte* base, int n_threads);
  bool is_streamed() const { return options_.score_rows > 0; }
  int64_t n_segments() const { return (options_.context + kKvSegment - 1) / kKvSegment; }
  int64_t max_staged() const { return (options_.max_rows + kKvTileTokens - 1) / kKvTileTokens + 1; }

  View view(const BatchRows& rows, int64_t layer, int64_t row, int64_t head) const;
  // Copies what a row of a tree sees behind the committed tokens, if it must be.
  void copy_staged(const BatchRows& rows, std::byte* staged, View* view) const;
  const std::byte* tile(const View& view, KvHalf half, int64_t position) const;
  TileArgs args(const View& view, const Work& work) const;
  // The keys of one segment that the view sees: the softmax of their scores, and the sums over their values.
  void attend_segment(const View& view, int64_t segment, const Work& work, SegmentSum* found, int32_t* sums) const;
  void merge(const SegmentSum* found, const int32_t* sums, const Work& work) const;
  void reset(const Work& work) const;
  void attend_tail(const BatchRows& rows, const View& view, const Rows& at, const Work& work) const;
  void finish(const View& view, const Rows& at, const Work& work) const;
  void attend_view(const BatchRows& rows, const View& view, const Rows& at, const Work& work) const;
  // One row: its segments are shared out among threads.
  void attend_split(const BatchRows& rows, int64_t layer, const Rows& at);
  Status stream_block(const BatchRows& rows, int64_t layer, int64_t row_begin, int64_t row_end, const Rows& at);

  const DecoderConfig& config_;
  TileAttentionOptions options_;
  const Kernels& kernels_;
  const TileKernels& steps_;
  ThreadPool& pool_;
  KvTileLayout layout_;
  int64_t group_;
  Block memory_;
  int8_t* queries_ = nullptr;        // [max_rows][n_heads][padded]
  float* query_scales_ = nullptr;    // [max_rows][n_heads]
  int32_t* query_sums_ = nullptr;
  std::byte* works_ = nullptr;       // a Work for every thread; streamed: for every view of a block
  uint64_t work_bytes_ = 0;
  std::byte* staged_ = nullptr;      // for every thread copies of tiles
  SegmentSum* found_ = nullptr;      // [n_kv_heads][n_segments][group], of attend_split
  int32_t* found_sums_ = nullptr;    // likewise, [padded] each
};

}  // namespace edge
