// One decoder for every family: embed, layers of attention and FFN, final norm, head.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/budget.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "kv/kv_cache.h"
#include "model/activation.h"
#include "model/batch_rows.h"
#include "model/decoder_config.h"
#include "model/ffn_rows.h"
#include "model/linear.h"
#include "model/row_attention.h"
#include "model/scratch.h"
#include "model/sparse_ffn.h"
#include "model/tile_attention.h"
#include "model/weights.h"
#include "store/weight_store.h"

namespace edge {

// Rows of one forward pass. parents[i] is the batch row before row i, or -1 for the last committed token, so a prompt
// chunk is the chain -1, 0, 1, ... and a token tree any forest in topological order (parents[i] < i).
struct Batch {
  std::span<const int32_t> tokens;
  std::span<const int32_t> parents;
};

// One text's share of a batch: its rows follow those of the parts before it and are staged in `kv`. A parent is a row of
// the same part, counted from the batch's first; -1 is the last token committed to `kv`.
struct BatchPart {
  KvCache* kv = nullptr;
  int64_t n_rows = 0;
};

struct DecoderOptions {
  int64_t max_rows = 128;   // rows of one pass
  int64_t context = 0;      // tokens the KV cache can hold
  // Where keys and values lie on a drive: rows whose scores are held at once, and the tokens of one read. 0: in memory.
  int64_t score_rows = 0;
  int64_t range_tokens = 0;
  // Where a predictor decides: the share of a layer's energy for which neurons without a place in memory are read
  // (model/neuron_price.h), in (0, 1].
  float neuron_keep = 1;
  int64_t neuron_free_reads = 0;  // and so many of a layer in any case
};

class Decoder {
 public:
  // All of the decoder's own memory, in bytes: what create() takes from the budget.
  static uint64_t scratch_bytes(const DecoderConfig& config, const DecoderOptions& options, int n_threads);

  // The references must outlive the decoder.
  static Result<std::unique_ptr<Decoder>> create(const DecoderConfig& config, const DecoderOptions& options,
                                                 const PackDirectory& directory, WeightStore& store,
                                                 const Kernels& kernels, ThreadPool& pool, Budget& budget);

  // Gives back the decoder's own memory (but for thresholds), between passes; nothing can be computed until reserve().
  void release();
  // With other rows of a pass, say. The context stays what it was. The store must hold its plan's neurons.
  Status reserve(const DecoderOptions& options, Budget& budget);

  // Runs the batch and stages its keys and values in `kv`; the caller commits or rolls back. Nothing is staged on error.
  // kCancelled when `interrupted` says so; it is asked once per layer.
  Status forward(const Batch& batch, KvCache& kv);
  // The same for several texts, each with a cache of its own: every weight is read once for all of them, and no row's
  // result depends on the others. kUnsupported where keys and values lie on a drive and there is more than one part.
  Status forward(const Batch& batch, std::span<const BatchPart> parts);
  // Keeps the rows of the last batch named by `path` (ascending, each the parent of the next), in `kv` and in what the
  // store learns from.
  void commit(std::span<const int32_t> path, KvCache& kv);
  void commit_all(KvCache& kv);
  // Keeps all rows of the last batch, each in its part's cache.
  void commit_all(std::span<const BatchPart> parts);
  // Logits of rows of the last batch, in `rows` order: visit(i, logits[vocab_size]) may change them. Those
  // of the last rows, Scratch::kLogitRows or fewer, stay where they are until the next pass.
  using Visit = std::function<Status(size_t i, std::span<float> logits)>;
  Status logits(std::span<const int32_t> rows, const Visit& visit);
  // The final-normed hidden state [hidden_size] of a row of the last batch.
  Status hidden(int32_t row, std::span<float> out);
  // Logits of hidden states [n][hidden_size] as hidden() gives them, at most kMaxProjected: the head is read for them
  // out of turn, so it must not be a streamed weight.
  static constexpr int64_t kMaxProjected = Scratch::kLogitRows;
  Status project(const float* states, int64_t n, const Visit& visit);
  WeightId head() const { return weights_.head; }

  // How small an activation may be and still count, in layers that come by neuron (model/sparse_ffn.h). Keys and values
  // computed before are those of the thresholds before. kBadArgument also for a model without such layers.
  Status set_neuron_thresholds(std::span<const float> thresholds, Budget& budget);

  std::function<bool()> interrupted;
  // Told what every dense layer whose gates are computed saw; empty: nobody asks.
  WatchFfn watch_ffn;
  const DecoderConfig& config() const { return config_; }
  int64_t max_rows() const { return options_.max_rows; }

 private:
  Decoder(const DecoderConfig& config, const DecoderOptions& options, const PackDirectory& directory,
          WeightStore& store, const Kernels& kernels, ThreadPool& pool);

  Status check(const Batch& batch, std::span<const BatchPart> parts) const;
  Status check_part(const Batch& batch, const BatchPart& part, int64_t first_row) const;
  Status stage(std::span<const BatchPart> parts);
  void place(const Batch& batch, std::span<const BatchPart> parts);  // homes, positions, rotations, visibility
  Status embed(const Batch& batch);
  Status attention(int64_t layer);
  BatchRows batch_rows() const {
    return {n_rows_, homes_.data(), positions_.data(), visible_.data(), mask_words_};
  }
  Status attend_any(int64_t layer);
  static uint64_t stream_bytes(const DecoderConfig& config, const DecoderOptions& options, int n_threads);
  void start_stream(KvCache& kv);  // the reads of keys and values of this pass
  Status attend_streamed(int64_t layer, KvCache& kv);
  Status attend_block(int64_t layer, KvCache& kv, int64_t row_begin, int64_t row_end);
  int64_t n_staged_visible(int64_t layer, int64_t row) const;      // rows of the batch that it sees, itself included
  Status ffn(const LayerWeights& layer, const float* x, int64_t n_rows, float* out);
  // A row that chose an expert.
  struct Choice {
    int64_t row;
    float weight;
  };
  Status route(const LayerWeights& layer, const float* x, std::vector<std::vector<Choice>>* chosen);
  Status guess_experts(int64_t layer);
  Status mixture(const LayerWeights& layer, const float* x);
  Status by_neuron(int64_t layer);
  Status norm(WeightId weight, WeightId bias, const float* x, int64_t x_stride, int64_t n_rows, float* out);
  Status rotate_and_store(int64_t layer);
  Status head_product(int64_t n, size_t first, const Visit& visit);  // of scratch_.normed
  void activate_rows(const float* gate, const float* up, int64_t n_rows, int64_t n, float* out);

  DecoderConfig config_;
  DecoderOptions options_;
  const PackDirectory& directory_;
  WeightStore& store_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  Linear linear_;
  ModelWeights weights_;
  Scratch scratch_;
  Block score_memory_;  // [score_rows][n_heads][context] floats, then pointers per thread; streamed attention only
  std::unique_ptr<TileAttention> tiles_;  // null where keys and values are f16
  std::unique_ptr<RowAttention> row_attention_;  // null where they are not, or lie on a drive
  std::unique_ptr<ActRows> acts_;
  Block thresholds_;                   // sparse_'s, while there is none
  NeuronPrice price_;                  // sparse_'s as well
  std::unique_ptr<SparseFfn> sparse_;  // null when no layer comes by neuron

  // The batch in flight.
  int64_t n_rows_ = 0;
  std::vector<RowHome> homes_;  // per row
  std::vector<int64_t> positions_;
  std::vector<uint64_t> visible_;   // [n_rows][mask_words]: batch rows that row i sees, itself included
  int64_t mask_words_ = 0;
};

}  // namespace edge
