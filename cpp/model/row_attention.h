// Attention over f16 keys and values in memory.
//
// Rows of one text see the same committed tokens, and often staged ones: the heads of such rows are one group over what all
// of them see (kernels/ops_attention.h), so a key or value becomes floats once for all of them. What only some see follows row by
// row, in the order of the tokens, so a head's sums are those that it has alone.
#pragma once

#include <memory>
#include <vector>

#include "core/budget.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "model/batch_rows.h"
#include "model/decoder_config.h"

namespace edge {

class RowAttention {
 public:
  static uint64_t bytes(const DecoderConfig& config, int64_t context, int n_threads);
  // The references must outlive it.
  static Result<std::unique_ptr<RowAttention>> create(const DecoderConfig& config, int64_t context,
                                                      const Kernels& kernels, ThreadPool& pool, Budget& budget);

  // out [n_rows][stride] = attention of queries q [n_rows][stride] over what each row sees; keys and values are staged.
  void attend(const BatchRows& rows, int64_t layer, const float* q, float* out, int64_t stride);

 private:
  // Query heads that share a pass over keys: enough for the register tiles of every ISA.
  static constexpr int64_t kSharedHeads = 16;
  // Rows one after the other, of one text. A column is a token that some of them see: committed ones from `first` on, then
  // staged ones.
  struct RowBlock {
    int64_t row = 0, n_rows = 0;
    int64_t first = 0;             // slot of column 0
    int64_t n_columns = 0;
    int64_t shared_begin = 0;      // all rows see the committed columns from here on
    int64_t n_shared_staged = 0;   // and all see the same of the batch's rows before this one
  };
  struct Inputs {
    const BatchRows& rows;
    int64_t layer;
    const float* q;
    float* out;
    int64_t stride;
  };
  // What is one row's own: its scores begin with those of column `begin`.
  struct RowPart {
    int64_t row = 0, begin = 0;
    AttentionArgs args;
  };
  using Step = void (*)(const AttentionArgs&);
  // Room of one thread.
  struct Work {
    float* scores = nullptr;               // [heads][columns]
    float* out = nullptr;                  // [heads][head_dim]
    const uint16_t** keys = nullptr;       // [columns]
  };

  RowAttention(const DecoderConfig& config, int64_t context, const Kernels& kernels, ThreadPool& pool);
  uint64_t carve(std::byte* base, Work* work) const;
  int64_t n_scores() const;  // of one thread
  int64_t rows_per_block(int64_t n_rows, int64_t n_columns) const;
  void divide(const BatchRows& rows, int64_t layer, int64_t most_rows);
  RowBlock block_of(const BatchRows& rows, int64_t layer, int64_t row, int64_t n_rows) const;
  int64_t list_staged(const Inputs& in, int64_t row, int64_t begin, int64_t end, const uint16_t** keys,
                      int64_t column) const;
  void attend_block(const Inputs& in, const RowBlock& block, int64_t kv_head, const Work& work) const;

  const DecoderConfig& config_;
  const int64_t context_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const int64_t group_;
  Block memory_;
  std::vector<Work> works_;          // per thread
  std::vector<RowBlock> blocks_;     // of the layer in flight
};

}  // namespace edge
