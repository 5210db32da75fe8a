#include "model/sparse_ffn.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

namespace edge {
namespace {

// Neurons whose dot products one thread takes at a time: their values for 64 rows fit its first cache.
constexpr int64_t kDotNeurons = 32;
// Neurons whose users are looked up in one go: each row's share of them should fill whole registers.
constexpr size_t kSharedNeurons = 256;
// Activation rows that go with them at a time, so that these stay in that cache too.
constexpr int64_t kDotRows = 16;
// More rows want nearly every neuron between them.
constexpr int64_t kAheadRows = 4;
// Neurons added in one go: for many rows their columns stay in the second cache.
constexpr int64_t kColumnNeurons = 256;

// Which of a few neurons each row uses: places in the list they were given in, ascending.
template <size_t kMost>
class Users {
 public:
  Users(std::span<const int32_t> wanted, const uint64_t* rows_of) {
    static_assert(kMost <= 256, "places are bytes");
    for (size_t i = 0; i < wanted.size(); ++i) {
      for (uint64_t rows = rows_of[wanted[i]]; rows != 0; rows &= rows - 1) {
        const auto row = static_cast<size_t>(std::countr_zero(rows));
        places_[row][n_[row]++] = static_cast<uint8_t>(i);
      }
    }
  }
  std::span<const uint8_t> of(int64_t row) const {
    return {places_[static_cast<size_t>(row)].data(), n_[static_cast<size_t>(row)]};
  }

 private:
  std::array<std::array<uint8_t, kMost>, Scratch::kNeuronRows> places_;
  std::array<uint16_t, Scratch::kNeuronRows> n_{};
};

}  // namespace

Status SparseFfn::add(const LayerWeights& layer) {
  const bool guessed = layer.predictor_up != kNoWeight && linear_.vector(layer.predictor_bias).ok();
  guessed_.resize(static_cast<size_t>(config_.n_layers));
  guessed_[static_cast<size_t>(layer.index)] = guessed;
  const bool has_gates = window_.whole(layer.neuron_gates) != nullptr || store_.has(layer.neuron_gates);
  if (guessed || has_gates || window_.whole(layer.neuron_records) != nullptr) return {};
  return error(Code::kBadArgument, "store plan: %s: expected all records, the gates or a predictor, found none",
               directory_.entry(layer.neuron_records).name.c_str());
}

Status SparseFfn::set_thresholds(std::span<const float> thresholds, Budget& budget) {
  thresholds_ = {};
  if (thresholds.empty()) return {};
  const int64_t expected = config_.n_layers * config_.intermediate_size;
  if (static_cast<int64_t>(thresholds.size()) != expected) {
    return error(Code::kBadArgument, "neuron thresholds: expected %lld, found %zu", static_cast<long long>(expected),
                 thresholds.size());
  }
  const auto bad = std::find_if(thresholds.begin(), thresholds.end(),
                                [](float t) { return !std::isfinite(t) || t < 0.0f; });
  if (bad != thresholds.end()) {
    return error(Code::kBadArgument, "neuron thresholds: expected finite numbers of 0 or more, found %g",
                 static_cast<double>(*bad));
  }
  EDGE_ASSIGN(thresholds_, budget.reserve(thresholds.size_bytes(), "neuron thresholds"));
  std::memcpy(thresholds_.data(), thresholds.data(), thresholds.size_bytes());
  return {};
}

bool SparseFfn::guesses(const LayerWeights& layer) const {
  return layer.neuron_records != kNoWeight && guessed_[static_cast<size_t>(layer.index)];
}

bool SparseFfn::looks_ahead(const LayerWeights& layer, int64_t n_rows) const {
  return n_rows <= kAheadRows && guesses(layer) && window_.expects(layer.neuron_records);
}

Status SparseFfn::run(const LayerWeights& layer, const float* x, int64_t n_rows, float* out, const WatchFfn& watch,
                      const Ahead& ahead) {
  const int64_t stride = pad16(config_.hidden_size);
  for (int64_t row = 0; row < n_rows; row += Scratch::kNeuronRows) {
    const int64_t n = std::min(Scratch::kNeuronRows, n_rows - row);
    EDGE_TRY(block(layer, x + row * stride, row, n, out + row * stride, watch, ahead));
  }
  return {};
}

Status SparseFfn::block(const LayerWeights& layer, const float* x, int64_t first_row, int64_t n_rows, float* out,
                        const WatchFfn& watch, const Ahead& ahead) {
  EDGE_ASSIGN(Turn turn, begin(layer, x, n_rows));
  if (turn.records != nullptr) {
    EDGE_TRY(whole(turn, watch, first_row, ahead));
  } else {
    EDGE_TRY(some(turn, watch, first_row, ahead));
  }
  const int64_t hidden = config_.hidden_size, out_stride = pad32(hidden);
  EDGE_ASSIGN(const float* down_bias, linear_.vector(layer.down_bias));
  for (int64_t row = 0; row < n_rows; ++row) {
    float* into = out + row * pad16(hidden);
    std::memcpy(into, scratch_.neuron_out + row * out_stride, static_cast<size_t>(hidden) * sizeof(float));
    std::fill(into + hidden, into + pad16(hidden), 0.0f);
    if (down_bias != nullptr) kernels_.add(down_bias, hidden, into);
  }
  return {};
}

void SparseFfn::show_gates(const Turn& turn, const WatchFfn& watch, int64_t first_row) {
  const float* hidden = scratch_.hidden + first_row * pad16(config_.hidden_size);
  if (watch) watch({turn.layer->index, first_row, turn.n_rows, turn.x, hidden, scratch_.gate});
}

Status SparseFfn::some(Turn& turn, const WatchFfn& watch, int64_t first_row, const Ahead& ahead) {
  const LayerWeights& layer = *turn.layer;
  if (guesses(layer)) {
    turn.exact = false;
    turn.priced = !price_.is_free() && !window_.slots_of(layer.neuron_records).empty();
    EDGE_TRY(predict(layer, turn.x, turn.n_rows, scratch_.gate));
  } else {
    EDGE_TRY(gates(turn));
    show_gates(turn, watch, first_row);
    activate_gates(turn);
  }
  collect(turn);
  EDGE_TRY(window_.want(layer.neuron_records, {scratch_.neurons, turn.n_wanted},
                        {scratch_.neuron_rows, turn.n_wanted}, scratch_.records));
  if (ahead.layer != nullptr) EDGE_TRY(expect(ahead, turn.n_rows));
  std::fill_n(scratch_.computed, turn.n_wanted, false);
  std::fill_n(scratch_.neuron_out, turn.n_rows * pad32(config_.hidden_size), 0.0f);
  // What is in memory is multiplied while the rest arrives; columns are added in order as they become known.
  EDGE_TRY(start(turn));
  for (size_t done = 0; done < turn.n_wanted;) {
    EDGE_ASSIGN(const size_t end, window_.take());
    values(turn, done, end, [] {});
    add_columns(turn, done, end);
    done = end;
  }
  if (turn.priced) learn(turn);
  return {};
}

Result<SparseFfn::Turn> SparseFfn::begin(const LayerWeights& layer, const float* x, int64_t n_rows) {
  const PackEntry& entry = directory_.entry(layer.neuron_records);
  Turn turn = {};
  turn.layer = &layer;
  turn.x = x;
  turn.n_rows = n_rows;
  turn.format = entry.format;
  turn.row_bytes = neuron_row_bytes(entry.format, entry.cols);
  turn.gate_offset = 0;
  turn.up_offset = config_.gated ? turn.row_bytes : 0;
  turn.down_offset = turn.up_offset + turn.row_bytes;
  turn.exact = true;
  if (!guesses(layer)) turn.records = window_.whole(layer.neuron_records);
  turn.record_bytes = entry.chunk_bytes;
  turn.n_words = (entry.rows + 63) / 64;
  turn.act_stride = neuron_act_bytes(entry.format, entry.cols);
  turn.gate_stride = pad16(entry.rows);
  EDGE_ASSIGN(turn.up_bias, linear_.vector(layer.up_bias));
  // Without a gate the up rows decide.
  EDGE_ASSIGN(turn.gate_bias, linear_.vector(config_.gated ? layer.gate_bias : layer.up_bias));
  if (thresholds_.data() != nullptr) turn.threshold = thresholds_.as<float>() + layer.index * config_.intermediate_size;
  const int64_t stride = pad16(config_.hidden_size);
  pool_.parallel(n_rows, row_grain(config_.hidden_size), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      kernels_.neuron.act[neuron_index(turn.format)](x + row * stride, config_.hidden_size,
                                                     scratch_.neuron_acts + row * turn.act_stride);
    }
  });
  return turn;
}

Status SparseFfn::gates(const Turn& turn) {
  const WeightId beside = turn.layer->neuron_gates;
  const uint64_t stride_bytes = directory_.entry(beside).chunk_bytes;
  const int64_t n_neurons = config_.intermediate_size;
  const auto keep = [&](int64_t row, int64_t first, int64_t n, const float* values) {
    std::copy_n(values, n, scratch_.gate + row * turn.gate_stride + first);
  };
  if (const std::byte* rows = window_.whole(beside)) {
    dot_gates(turn, rows, stride_bytes, 0, n_neurons, keep);
  } else {
    for (int64_t first = 0; first < n_neurons;) {
      EDGE_ASSIGN(const TileLease some, store_.acquire_tiles(beside, first));
      const int64_t end = std::min(some.end_tile, n_neurons);
      dot_gates(turn, some.lease.data(), stride_bytes, first, end, keep);
      first = end;
    }
  }
  return {};
}

void SparseFfn::activate_gates(const Turn& turn) {
  // Pieces of rows, in whole registers: which elements go together changes no bit.
  constexpr int64_t kPiece = 4096;
  const int64_t n = config_.intermediate_size, per_row = (n + kPiece - 1) / kPiece;
  pool_.parallel(turn.n_rows * per_row, row_grain(std::min(n, kPiece)), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_row * kPiece;
      float* gate = scratch_.gate + i / per_row * turn.gate_stride + first;
      activate(kernels_, config_.activation, gate, nullptr, std::min(kPiece, n - first), gate);
    }
  });
}

Status SparseFfn::predict(const LayerWeights& layer, const float* x, int64_t n_rows, float* scores) {
  const int64_t rank = directory_.entry(layer.predictor_down).rows;
  acts_.set(x, pad16(config_.hidden_size), n_rows, config_.hidden_size);
  const Product down{layer.predictor_down, scratch_.up, pad16(rank)};
  EDGE_TRY(linear_.run(acts_, {&down, 1}));
  acts_.set(scratch_.up, pad16(rank), n_rows, rank);
  const Product up{layer.predictor_up, scores, pad16(config_.intermediate_size), layer.predictor_bias};
  return linear_.run(acts_, {&up, 1});
}

Status SparseFfn::expect(const Ahead& ahead, int64_t n_rows) {
  // The gates of this turn lie before; decoding leaves most rows of a block unused.
  const int64_t n_neurons = config_.intermediate_size, stride = pad16(n_neurons);
  float* const scores = scratch_.gate + n_rows * stride;
  EDGE_TRY(predict(*ahead.layer, ahead.x, n_rows, scores));
  for (int64_t row = 1; row < n_rows; ++row) {
    for (int32_t i = 0; i < n_neurons; ++i) scores[i] = std::max(scores[i], scores[row * stride + i]);
  }
  size_t n = 0;
  for (int32_t i = 0; i < n_neurons; ++i) {
    scratch_.expected[n] = i;
    n += scores[i] > 0.0f;
  }
  const float price = price_of(*ahead.layer, {scratch_.expected, n}, scores);
  if (price > 0.0f) {
    int32_t* const end = std::remove_if(scratch_.expected, scratch_.expected + n,
                                        [&](int32_t i) { return !(scores[i] > price); });
    n = static_cast<size_t>(end - scratch_.expected);
  }
  return window_.expect(ahead.layer->neuron_records, {scratch_.expected, n});
}

void SparseFfn::collect(Turn& turn) {
  const int64_t n_neurons = config_.intermediate_size;
  uint64_t* used = scratch_.neuron_rows;
  // Bits as wide as the gates, so that registers of both go together; the list that lies there is made below.
  auto* const bits = reinterpret_cast<uint32_t*>(scratch_.neurons);
  const auto mark = [&](auto is_active) {
    std::fill_n(used, n_neurons, 0u);
    for (int64_t first = 0; first < turn.n_rows; first += 32) {
      std::fill_n(bits, n_neurons, 0u);
      for (int64_t row = first; row < std::min(first + 32, turn.n_rows); ++row) {
        const float* gate = scratch_.gate + row * turn.gate_stride;
        const uint32_t bit = 1u << (row - first);
        for (int64_t i = 0; i < n_neurons; ++i) bits[i] |= is_active(gate[i], i) ? bit : 0u;
      }
      for (int64_t i = 0; i < n_neurons; ++i) used[i] |= static_cast<uint64_t>(bits[i]) << first;
    }
  };
  if (!turn.exact) {
    mark([](float gate, int64_t) { return gate > 0.0f; });
  } else if (turn.threshold == nullptr) {
    mark([](float gate, int64_t) { return gate != 0.0f; });
  } else {
    // What is not a number is active: it has to reach the sum.
    mark([threshold = turn.threshold](float gate, int64_t i) { return !(std::fabs(gate) <= threshold[i]); });
  }
  size_t n = 0;
  for (int64_t i = 0; i < n_neurons; ++i) {
    scratch_.neurons[n] = static_cast<int32_t>(i);
    n += used[i] != 0;
  }
  if (turn.priced) n = pass_over(turn, n);
  for (size_t i = 0; i < n; ++i) used[i] = used[scratch_.neurons[i]];
  turn.n_wanted = n;
}

float SparseFfn::price_of(const LayerWeights& layer, std::span<const int32_t> predicted, const float* highest) const {
  const std::span<const int32_t> slots = window_.slots_of(layer.neuron_records);
  if (price_.is_free() || slots.empty()) return 0.0f;
  NeuronPrice::Counts n_predicted{}, n_missing{};
  for (const int32_t i : predicted) {
    const uint8_t bin = NeuronPrice::bin_of(highest[i]);
    ++n_predicted[bin];
    n_missing[bin] += slots[static_cast<size_t>(i)] < 0;
  }
  return price_.price(layer.index, n_predicted, n_missing);
}

size_t SparseFfn::pass_over(const Turn& turn, size_t n_used) {
  // Whoever uses a neuron is known by now: the first row of scores makes room for the highest.
  const WeightId records = turn.layer->neuron_records;
  const std::span<const int32_t> slots = window_.slots_of(records), used(scratch_.neurons, n_used);
  float* const highest = scratch_.gate;
  for (const int32_t i : used) scratch_.score_row[i] = 0;
  for (int64_t row = 1; row < turn.n_rows; ++row) {
    const float* scores = scratch_.gate + row * turn.gate_stride;
    for (const int32_t i : used) {
      if (!(scores[i] > highest[i])) continue;
      highest[i] = scores[i];
      scratch_.score_row[i] = static_cast<uint8_t>(row);
    }
  }
  const float price = price_of(*turn.layer, used, highest);
  size_t n = 0;
  for (const int32_t i : used) {
    if (slots[static_cast<size_t>(i)] < 0 && !(highest[i] > price)) {
      window_.pass_over(records, i, scratch_.neuron_rows[i]);
      continue;
    }
    scratch_.score_bin[n] = NeuronPrice::bin_of(highest[i]);
    scratch_.score_row[n] = scratch_.score_row[i];
    scratch_.neurons[n++] = i;
  }
  return n;
}

void SparseFfn::learn(const Turn& turn) {
  for (size_t i = 0; i < turn.n_wanted; ++i) {
    const float* values = scratch_.gate + scratch_.score_row[i] * turn.gate_stride;
    price_.saw(turn.layer->index, scratch_.score_bin[i], values[scratch_.neurons[i]]);
  }
}

void SparseFfn::multiply(const Turn& turn, std::span<const int32_t> wanted, int64_t row, int64_t n_rows) {
  const NeuronDotFn kernel = kernels_.neuron.dot[neuron_index(turn.format)];
  const auto n = static_cast<int64_t>(wanted.size());
  std::array<const std::byte*, kDotNeurons> rows;
  std::array<float, kDotNeurons * kDotRows> gate, up;
  const auto dot = [&](int64_t offset, float* out) {
    for (size_t i = 0; i < wanted.size(); ++i) rows[i] = scratch_.records[wanted[i]] + offset;
    kernel(rows.data(), n, config_.hidden_size, scratch_.neuron_acts + row * turn.act_stride, turn.act_stride, n_rows,
           out, kDotNeurons);
  };
  if (!turn.exact) dot(turn.gate_offset, gate.data());
  if (config_.gated) dot(turn.up_offset, up.data());
  for (int64_t r = 0; r < n_rows; ++r) {
    float* value = scratch_.gate + (row + r) * turn.gate_stride;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t neuron = scratch_.neurons[wanted[static_cast<size_t>(i)]];
      const auto at = static_cast<size_t>(r * kDotNeurons + i);
      float g = value[neuron], u = 1.0f;  // of an exact gate, its activation
      if (!turn.exact) {
        g = turn.gate_bias == nullptr ? gate[at] : gate[at] + turn.gate_bias[neuron];
        // A predictor knows relu alone, and may hold likely what is not active.
        if (!(g > (turn.threshold == nullptr ? 0.0f : turn.threshold[neuron]))) g = 0.0f;
      }
      if (config_.gated) u = turn.up_bias == nullptr ? up[at] : up[at] + turn.up_bias[neuron];
      value[neuron] = g == 0.0f ? 0.0f : g * u;
    }
  }
}

Status SparseFfn::start(const Turn& turn) {
  Status status;
  values(turn, 0, turn.n_wanted, [&] { status = window_.read_on(); });
  return status;
}

template <typename Meanwhile>
void SparseFfn::values(const Turn& turn, size_t begin, size_t end, const Meanwhile& meanwhile) {
  const auto n = static_cast<int64_t>(end - begin);
  // Most neurons have one user or all rows.
  const int64_t work_bytes = n * turn.row_bytes * (turn.n_rows + 1) / 2;
  const int64_t n_pieces = std::clamp<int64_t>(work_bytes / kPieceBytes, 1, pool_.size() * kPiecesPerThread);
  const uint64_t all_rows = ~uint64_t{0} >> (64 - turn.n_rows);
  bool is_done = false;  // meanwhile
  pool_.parallel(n, (n + n_pieces - 1) / n_pieces, [&](int64_t from, int64_t to, int thread) {
    if (thread == 0 && !is_done) {
      is_done = true;
      meanwhile();
    }
    std::array<int32_t, kSharedNeurons> wanted;
    size_t n_here = 0;
    const auto multiply_all = [&](std::span<const int32_t> neurons, int64_t row, int64_t n_rows) {
      for (size_t at = 0; at < neurons.size(); at += kDotNeurons) {
        multiply(turn, neurons.subspan(at, std::min<size_t>(kDotNeurons, neurons.size() - at)), row, n_rows);
      }
    };
    const auto finish = [&] {
      const std::span<const int32_t> here(wanted.data(), n_here);
      uint64_t of_all = all_rows;
      for (const int32_t i : here) of_all &= scratch_.neuron_rows[i];
      if (of_all == all_rows) {
        for (int64_t row = 0; row < turn.n_rows; row += kDotRows) {
          multiply_all(here, row, std::min(kDotRows, turn.n_rows - row));
        }
      } else {
        // Sharing a neuron between rows gains less than leaving out the rows that do not use it.
        const Users<kSharedNeurons> users(here, scratch_.neuron_rows);
        std::array<int32_t, kSharedNeurons> own;
        for (int64_t row = 0; row < turn.n_rows; ++row) {
          const std::span<const uint8_t> used = users.of(row);
          for (size_t i = 0; i < used.size(); ++i) own[i] = here[used[i]];
          multiply_all({own.data(), used.size()}, row, 1);
        }
      }
      for (const int32_t i : here) scratch_.computed[i] = true;
      n_here = 0;
    };
    for (int64_t i = static_cast<int64_t>(begin) + from; i < static_cast<int64_t>(begin) + to; ++i) {
      if (scratch_.computed[i] || scratch_.records[i] == nullptr) continue;
      wanted[n_here++] = static_cast<int32_t>(i);
      if (n_here == wanted.size()) finish();
    }
    if (n_here > 0) finish();
  });
  if (!is_done) meanwhile();
}

void SparseFfn::add_columns(const Turn& turn, size_t begin, size_t end) {
  constexpr int64_t kBlock = 32;  // columns
  const int64_t width = pad32(config_.hidden_size), n_blocks = width / kBlock;
  struct Active {
    std::array<const std::byte*, kColumnNeurons> column;
    std::array<float, kColumnNeurons> value;
    int64_t n = 0;
  };
  for (size_t at = begin; at < end; at += kColumnNeurons) {
    std::array<int32_t, kColumnNeurons> wanted;
    const size_t n = std::min<size_t>(kColumnNeurons, end - at);
    std::iota(wanted.begin(), wanted.begin() + static_cast<int64_t>(n), static_cast<int32_t>(at));
    const Users<kColumnNeurons> users({wanted.data(), n}, scratch_.neuron_rows);
    const auto pick = [&](int64_t row, Active* active) {
      const float* value = scratch_.gate + row * turn.gate_stride;
      active->n = 0;
      for (const uint8_t used : users.of(row)) {
        const size_t i = at + used;
        const float of_neuron = value[scratch_.neurons[i]];
        if (of_neuron == 0.0f) continue;
        active->column[static_cast<size_t>(active->n)] = scratch_.records[i] + turn.down_offset;
        active->value[static_cast<size_t>(active->n++)] = of_neuron;
      }
    };
    const auto add = [&](int64_t row, const Active& active, int64_t first, int64_t last) {
      kernels_.neuron.axpy[neuron_index(turn.format)](active.column.data(), active.value.data(), active.n,
                                                      first * kBlock, last * kBlock,
                                                      scratch_.neuron_out + row * width);
    };
    if (turn.n_rows >= pool_.size() && turn.n_rows > 1) {
      pool_.parallel(turn.n_rows, 1, [&](int64_t from, int64_t to, int) {
        Active active;
        for (int64_t row = from; row < to; ++row) {
          pick(row, &active);
          add(row, active, 0, n_blocks);
        }
      });
      continue;
    }
    for (int64_t row = 0; row < turn.n_rows; ++row) {
      Active active;
      pick(row, &active);
      const int64_t work_bytes = active.n * turn.row_bytes;
      const int64_t n_pieces = std::clamp<int64_t>(work_bytes / kPieceBytes, 1, pool_.size());
      pool_.parallel(n_blocks, (n_blocks + n_pieces - 1) / n_pieces,
                     [&](int64_t from, int64_t to, int) { add(row, active, from, to); });
    }
  }
}

}  // namespace edge
