// A feed-forward layer by neuron ("LLM in a flash", arXiv 2312.11514, section 3): find the neurons that are active, fetch
// their records alone, and add their down columns in neuron order. A neuron is active unless act(gate) is zero: what is
// left out would have added nothing, so the bits are those of the whole layer, wherever the records live. The gate rows
// that tell are in the records where these are all in memory, else beside them, in memory or streaming.
//
// Where thresholds are set, a neuron is active when |act(gate)| is above its own: a loss, which makes other functions than
// relu sparse (CATS, arXiv 2404.08763; one for a layer there, one for each neuron here).
//
// Where a predictor decides, neurons may have a price (neuron_price.h): those without a slot whose score is not above it
// are passed over, another loss. Which those are depends on what is in memory, so then the text does too.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "core/budget.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "model/activation.h"
#include "model/decoder_config.h"
#include "model/ffn_rows.h"
#include "model/linear.h"
#include "model/neuron_price.h"
#include "model/scratch.h"
#include "model/weights.h"
#include "store/neuron_window.h"

namespace edge {

class SparseFfn {
 public:
  // The references must outlive it.
  SparseFfn(const DecoderConfig& config, const PackDirectory& directory, WeightStore& store, NeuronWindow& window,
            const Kernels& kernels, ThreadPool& pool, Linear& linear, ActRows& acts, const Scratch& scratch,
            NeuronPrice& price)
      : config_(config), directory_(directory), store_(store), window_(window), kernels_(kernels), pool_(pool),
        linear_(linear),
        acts_(acts), scratch_(scratch), price_(price) {}

  // Takes a layer in: its predictor decides where the plan loaded it, else its gate rows do. kBadArgument for neither.
  Status add(const LayerWeights& layer);

  // [n_layers][intermediate_size], of layers that do not come by neuron anything; empty: none, which is zero for all.
  // Replaces those before, which go even when memory for the new ones is lacking. kBadArgument: one is below zero or not
  // finite, or their number is another; kOverBudget.
  Status set_thresholds(std::span<const float> thresholds, Budget& budget);

  // The layer after, and what it would get if this one and its attention added nothing: [n_rows][pad16(hidden)]. What
  // its predictor makes of that is read ahead (the residual stream changes slowly: "Deja Vu", arXiv 2310.17157,
  // section 4.3); what that layer wants is decided when it has its own input.
  struct Ahead {
    const LayerWeights* layer = nullptr;  // null: no guess is worth making
    const float* x = nullptr;
  };
  // Whether to give run() an Ahead of this layer.
  bool looks_ahead(const LayerWeights& layer, int64_t n_rows) const;

  // Thresholds go from one SparseFfn to the next of the same model.
  Block take_thresholds() { return std::move(thresholds_); }
  void keep_thresholds(Block thresholds) { thresholds_ = std::move(thresholds); }

  // out[n_rows][pad16(hidden)] = down(act(gate(x)) * up(x)), or down(act(up(x))); x is [n_rows][pad16(hidden)].
  // `watch`, where not empty, is told the gates, unless a predictor decides.
  Status run(const LayerWeights& layer, const float* x, int64_t n_rows, float* out, const WatchFfn& watch,
             const Ahead& ahead);

 private:
  // Less than this is done before another core has noticed.
  static constexpr int64_t kPieceBytes = 32 << 10;
  static constexpr int64_t kPiecesPerThread = 8;

  // One layer for at most Scratch::kNeuronRows rows.
  struct Turn {
    const LayerWeights* layer;
    const float* x;
    int64_t n_rows;
    WeightFormat format;
    int64_t row_bytes;     // of one dot row or column
    int64_t gate_offset;   // in a record
    int64_t up_offset;
    int64_t down_offset;
    bool priced;           // some of what a predictor names may be passed over
    bool exact;            // gates are known for all neurons; else a predictor says which records to read
    const float* gate_bias;  // null: none
    const float* up_bias;
    const float* threshold;  // null: zero
    int64_t act_stride;
    int64_t gate_stride;   // floats between rows of scratch.gate
    size_t n_wanted;
    const std::byte* records;  // all of the layer's, where gates decide and they are in memory; else null
    uint64_t record_bytes;
    int64_t n_words;           // of 64 neurons
  };

  Status block(const LayerWeights& layer, const float* x, int64_t first_row, int64_t n_rows, float* out,
               const WatchFfn& watch, const Ahead& ahead);
  // The sum in scratch.neuron_out, biases aside, where records are handed out as they arrive.
  Status some(Turn& turn, const WatchFfn& watch, int64_t first_row, const Ahead& ahead);
  void show_gates(const Turn& turn, const WatchFfn& watch, int64_t first_row);
  Result<Turn> begin(const LayerWeights& layer, const float* x, int64_t n_rows);
  // scratch.gate[row][neuron] of every neuron, from the rows beside the records, wherever those are.
  Status gates(const Turn& turn);
  // The same of neurons [first, end); `rows` is where neuron 0 is or would be. `each_word` gets 64 neurons
  // of a row at a time, (row, first neuron, n, values), while they are in the first cache.
  template <typename EachWord>
  void dot_gates(const Turn& turn, const std::byte* rows, uint64_t stride_bytes, int64_t first, int64_t end,
                 const EachWord& each_word) {
    // Gathered in pieces first: rows of gates lie so far apart that their lines would push each other out of the cache.
    constexpr int64_t kWord = 64, kRows = 16;
    const int64_t n_words = (end - first + kWord - 1) / kWord, work_bytes = (end - first) * turn.row_bytes * turn.n_rows;
    const int64_t n_pieces = std::clamp<int64_t>(work_bytes / kPieceBytes, 1, pool_.size() * kPiecesPerThread);
    pool_.parallel(n_words, (n_words + n_pieces - 1) / n_pieces, [&](int64_t from, int64_t to, int) {
      std::array<const std::byte*, kWord> word;
      std::array<float, kWord * kRows> values;
      for (int64_t at = first + from * kWord; at < std::min(end, first + to * kWord); at += kWord) {
        const int64_t n = std::min(kWord, end - at);
        for (int64_t i = 0; i < n; ++i) word[static_cast<size_t>(i)] = rows + static_cast<uint64_t>(at + i) * stride_bytes;
        for (int64_t row = 0; row < turn.n_rows; row += kRows) {
          const int64_t n_rows = std::min(kRows, turn.n_rows - row);
          kernels_.neuron.dot[neuron_index(turn.format)](word.data(), n, config_.hidden_size,
                                                         scratch_.neuron_acts + row * turn.act_stride, turn.act_stride,
                                                         n_rows, values.data(), kWord);
          for (int64_t i = 0; i < n_rows; ++i) {
            float* const of_row = values.data() + i * kWord;
            if (turn.gate_bias != nullptr) kernels_.add(turn.gate_bias + at, n, of_row);
            each_word(row + i, at, n, of_row);
          }
        }
      }
    });
  }
  // scratch.gate = act(scratch.gate).
  void activate_gates(const Turn& turn);
  // scores[row][neuron], above zero where a neuron is held likely to be active; rows are pad16(neurons) apart.
  Status predict(const LayerWeights& layer, const float* x, int64_t n_rows, float* scores);
  Status expect(const Ahead& ahead, int64_t n_rows);
  // Whether a predictor decides in a layer.
  bool guesses(const LayerWeights& layer) const;
  // The neurons that any row uses, their gates moved together.
  void collect(Turn& turn);
  // Of the neurons that some row would use those that have a slot or are worth a read move to the front; their number.
  size_t pass_over(const Turn& turn, size_t n_used);
  // The price of a layer, of the highest scores of a pass [neurons], above zero for those predicted; 0: nothing has one.
  float price_of(const LayerWeights& layer, std::span<const int32_t> predicted, const float* highest) const;
  // What became of the neurons that were computed.
  void learn(const Turn& turn);
  // While the other threads multiply what is in memory, this one hands the drive what is missing.
  Status start(const Turn& turn);
  // scratch.gate[row][neuron] = act(gate) * up of the wanted neurons [begin, end) whose records are here and not yet used;
  // of rows that do not use a neuron nothing is said. `meanwhile` is done by the thread that calls.
  template <typename Meanwhile>
  void values(const Turn& turn, size_t begin, size_t end, const Meanwhile& meanwhile);
  // The same for a few of them that all of rows [row, row + n_rows) use.
  void multiply(const Turn& turn, std::span<const int32_t> wanted, int64_t row, int64_t n_rows);
  // scratch.neuron_out += value * down column, for wanted neurons [begin, end) in order.
  void add_columns(const Turn& turn, size_t begin, size_t end);

  // The whole layer where all its records are in memory: which neurons a row uses is told in words of 64, and nothing is
  // handed out or waited for. scratch.neuron_out is the sum.
  Status whole(const Turn& turn, const WatchFfn& watch, int64_t first_row, const Ahead& ahead);
  // scratch.gate[row][64 word...] = act(gates of these neurons), and which of them the row uses.
  void settle_word(const Turn& turn, int64_t row, int64_t word, const float* gates);
  uint64_t* users(const Turn& turn, int64_t row) const { return scratch_.neuron_rows + row * turn.n_words; }
  // scratch.gate = act(gate) * up where a row uses the neuron.
  void whole_values(const Turn& turn, int64_t n_used);
  // The same in words [first, end), for rows that use the same neurons there.
  void multiply_words(const Turn& turn, int64_t row, int64_t n_rows, int64_t first, int64_t end);
  // scratch.neuron_out = the sum of value * down column.
  void whole_columns(const Turn& turn, int64_t n_used);
  void add_words(const Turn& turn, int64_t row, int64_t first, int64_t end, int64_t first_value, int64_t end_value);

  const DecoderConfig& config_;
  const PackDirectory& directory_;
  WeightStore& store_;
  NeuronWindow& window_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  Linear& linear_;
  ActRows& acts_;
  const Scratch& scratch_;
  NeuronPrice& price_;
  Block thresholds_;
  std::vector<bool> guessed_;  // by layer
};

}  // namespace edge
