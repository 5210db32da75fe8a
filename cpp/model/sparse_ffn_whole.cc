// A feed-forward layer by neuron whose records are all in memory. Gates, their activation and who uses what are one step of
// the pool, up rows the second, down columns the third; which neurons a row uses are bits, 64 to a word.
#include <algorithm>
#include <array>
#include <bit>

#include "model/sparse_ffn.h"

namespace edge {
namespace {

constexpr int64_t kWord = 64;
// Words that a thread takes at a time, row after row: their records stay in its second cache.
constexpr int64_t kWordsTogether = 4;
// Activation rows that share a neuron's.
constexpr int64_t kSharedRows = 16;
// Records whose columns are added in one go.
constexpr int64_t kColumnBytes = 512 << 10;
// Less than this is done before another core has noticed.
constexpr int64_t kPieceBytes = 16 << 10;

template <typename Fn>
void each_bit(uint64_t bits, const Fn& fn) {
  for (; bits != 0; bits &= bits - 1) fn(std::countr_zero(bits));
}

}  // namespace

Status SparseFfn::whole(const Turn& turn, const WatchFfn& watch, int64_t first_row, const Ahead& ahead) {
  const WeightId records = turn.layer->neuron_records;
  dot_gates(turn, turn.records + turn.gate_offset, turn.record_bytes, 0, config_.intermediate_size,
            [&](int64_t row, int64_t first, int64_t n, const float* values) {
              if (watch) std::copy_n(values, n, scratch_.gate + row * turn.gate_stride + first);
              else settle_word(turn, row, first / kWord, values);
            });
  if (watch) {
    show_gates(turn, watch, first_row);
    for (int64_t row = 0; row < turn.n_rows; ++row) {
      for (int64_t word = 0; word < turn.n_words; ++word) {
        settle_word(turn, row, word, scratch_.gate + row * turn.gate_stride + word * kWord);
      }
    }
  }
  int64_t n_used = 0, n_wanted = 0;  // by each row, by any
  for (int64_t word = 0; word < turn.n_words; ++word) {
    uint64_t any = 0;
    for (int64_t row = 0; row < turn.n_rows; ++row) {
      const uint64_t bits = users(turn, row)[word];
      n_used += std::popcount(bits);
      any |= bits;
    }
    n_wanted += std::popcount(any);
  }
  EDGE_TRY(window_.want_whole(records, static_cast<size_t>(n_wanted)));
  if (ahead.layer != nullptr) {
    EDGE_TRY(expect(ahead, turn.n_rows));
    EDGE_TRY(window_.read_on());
  }
  // Without a gate the value is known already.
  if (config_.gated) whole_values(turn, n_used);
  whole_columns(turn, n_used);
  return {};
}

void SparseFfn::settle_word(const Turn& turn, int64_t row, int64_t word, const float* gates) {
  const int64_t first = word * kWord, n = std::min(kWord, config_.intermediate_size - first);
  float* const values = scratch_.gate + row * turn.gate_stride + first;
  activate(kernels_, config_.activation, gates, nullptr, n, values);
  kernels_.beyond(values, turn.threshold == nullptr ? nullptr : turn.threshold + first, n, users(turn, row) + word);
}

void SparseFfn::whole_values(const Turn& turn, int64_t n_used) {
  const int64_t n_spans = (turn.n_words + kWordsTogether - 1) / kWordsTogether;
  const int64_t n_pieces = std::clamp<int64_t>(n_used * turn.row_bytes / kPieceBytes, 1, n_spans);
  const auto share = [&](int64_t first, int64_t end) {
    for (int64_t row = 1; row < turn.n_rows; ++row) {
      if (!std::equal(users(turn, 0) + first, users(turn, 0) + end, users(turn, row) + first)) return false;
    }
    return true;
  };
  pool_.parallel(n_spans, (n_spans + n_pieces - 1) / n_pieces, [&](int64_t from, int64_t to, int) {
    for (int64_t span = from; span < to; ++span) {
      const int64_t first = span * kWordsTogether, end = std::min(first + kWordsTogether, turn.n_words);
      // Sharing a neuron between some rows gains less than leaving out those that do not use it.
      const int64_t step = share(first, end) ? kSharedRows : 1;
      for (int64_t row = 0; row < turn.n_rows; row += step) {
        multiply_words(turn, row, std::min(step, turn.n_rows - row), first, end);
      }
    }
  });
}

void SparseFfn::multiply_words(const Turn& turn, int64_t row, int64_t n_rows, int64_t first, int64_t end) {
  std::array<int64_t, kWord> neurons;
  std::array<const std::byte*, kWord> rows;
  std::array<float, kWord * kSharedRows> up;
  size_t n = 0;
  const auto multiply = [&] {
    kernels_.neuron.dot[neuron_index(turn.format)](rows.data(), static_cast<int64_t>(n), config_.hidden_size,
                                                   scratch_.neuron_acts + row * turn.act_stride, turn.act_stride,
                                                   n_rows, up.data(), kWord);
    for (int64_t r = 0; r < n_rows; ++r) {
      float* const value = scratch_.gate + (row + r) * turn.gate_stride;
      const float* const factor = up.data() + r * kWord;
      for (size_t i = 0; i < n; ++i) {
        value[neurons[i]] *= turn.up_bias == nullptr ? factor[i] : factor[i] + turn.up_bias[neurons[i]];
      }
    }
    n = 0;
  };
  for (int64_t word = first; word < end; ++word) {
    each_bit(users(turn, row)[word], [&](int bit) {
      neurons[n] = word * kWord + bit;
      rows[n] = turn.records + static_cast<uint64_t>(neurons[n]) * turn.record_bytes + turn.up_offset;
      if (++n == kWord) multiply();
    });
  }
  if (n > 0) multiply();
}

void SparseFfn::whole_columns(const Turn& turn, int64_t n_used) {
  constexpr int64_t kBlock = 32;  // values of a column
  const int64_t n_blocks = pad32(config_.hidden_size) / kBlock;
  // Many rows are shared out evenly as they are; of few each thread takes a part of every one.
  const int64_t n_pieces = std::clamp<int64_t>(n_used * turn.row_bytes / kPieceBytes, 1, pool_.size());
  const int64_t n_parts = turn.n_rows >= 4 * pool_.size() ? 1 : std::min(n_pieces, n_blocks);
  const int64_t n_items = turn.n_rows * n_parts, grain = n_pieces == 1 ? n_items : 1;
  const int64_t n_words = std::max(kWordsTogether, kColumnBytes / (kWord * turn.row_bytes));
  for (int64_t first = 0; first < turn.n_words; first += n_words) {
    const int64_t end = std::min(first + n_words, turn.n_words);
    pool_.parallel(n_items, grain, [&](int64_t from, int64_t to, int) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t row = item / n_parts, part = item % n_parts;
        add_words(turn, row, first, end, part * n_blocks / n_parts * kBlock, (part + 1) * n_blocks / n_parts * kBlock);
      }
    });
  }
}

void SparseFfn::add_words(const Turn& turn, int64_t row, int64_t first, int64_t end, int64_t first_value,
                          int64_t end_value) {
  constexpr size_t kColumns = 256;
  std::array<const std::byte*, kColumns> columns;
  std::array<float, kColumns> factors;
  size_t n = 0;
  float* const out = scratch_.neuron_out + row * pad32(config_.hidden_size);
  const float* const value = scratch_.gate + row * turn.gate_stride;
  const auto add = [&] {
    kernels_.neuron.axpy[neuron_index(turn.format)](columns.data(), factors.data(), static_cast<int64_t>(n), first_value,
                                                    end_value, out);
    n = 0;
  };
  if (first == 0) std::fill(out + first_value, out + end_value, 0.0f);
  for (int64_t word = first; word < end; ++word) {
    each_bit(users(turn, row)[word], [&](int bit) {
      const int64_t neuron = word * kWord + bit;
      columns[n] = turn.records + static_cast<uint64_t>(neuron) * turn.record_bytes + turn.down_offset;
      factors[n] = value[neuron];
      if (++n == kColumns) add();
    });
  }
  if (n > 0) add();
}

}  // namespace edge
