#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/tiling.h"

namespace edge {
namespace {

TileAttentionOptions tile_options(const DecoderOptions& options) {
  return {options.max_rows, options.context, options.score_rows};
}

}  // namespace

Decoder::Decoder(const DecoderConfig& config, const DecoderOptions& options, const PackDirectory& directory,
                 WeightStore& store, const Kernels& kernels, ThreadPool& pool)
    : config_(config), options_(options), directory_(directory), store_(store), kernels_(kernels), pool_(pool),
      linear_(store, directory, kernels, pool) {}

uint64_t Decoder::scratch_bytes(const DecoderConfig& config, const DecoderOptions& options, int n_threads) {
  uint64_t attention = stream_bytes(config, options, n_threads);
  if (config.kv_type != KvType::kF16) attention += TileAttention::bytes(config, tile_options(options), n_threads);
  else if (options.score_rows == 0) attention += RowAttention::bytes(config, options.context, n_threads);
  return Scratch::bytes(config, options.max_rows) + attention;
}

Result<std::unique_ptr<Decoder>> Decoder::create(const DecoderConfig& config, const DecoderOptions& options,
                                                 const PackDirectory& directory, WeightStore& store,
                                                 const Kernels& kernels, ThreadPool& pool, Budget& budget) {
  EDGE_TRY(config.validate());
  std::unique_ptr<Decoder> decoder(new Decoder(config, options, directory, store, kernels, pool));
  EDGE_ASSIGN(decoder->weights_, ModelWeights::resolve(config, directory));
  EDGE_TRY(decoder->reserve(options, budget));
  return decoder;
}

Status Decoder::set_neuron_thresholds(std::span<const float> thresholds, Budget& budget) {
  if (sparse_ != nullptr) return sparse_->set_thresholds(thresholds, budget);
  return error(Code::kBadArgument, "neuron thresholds: expected a pack by neuron, found none of its layers so");
}

void Decoder::release() {
  if (sparse_ != nullptr) thresholds_ = sparse_->take_thresholds();
  sparse_.reset();
  acts_.reset();
  tiles_.reset();
  row_attention_.reset();
  scratch_ = Scratch();
  score_memory_.release();
}

Status Decoder::reserve(const DecoderOptions& options, Budget& budget) {
  if (!(options.neuron_keep > 0 && options.neuron_keep <= 1)) {
    return error(Code::kBadArgument, "neuron_keep: expected a share above 0, at most 1, found %g",
                 static_cast<double>(options.neuron_keep));
  }
  if (options.neuron_free_reads < 0) {
    return error(Code::kBadArgument, "neuron_free_reads: expected 0 or more, found %lld",
                 static_cast<long long>(options.neuron_free_reads));
  }
  release();
  options_ = options;
  price_.set_keep(options.neuron_keep, options.neuron_free_reads, config_.n_layers);
  EDGE_ASSIGN(scratch_, Scratch::create(config_, options.max_rows, budget));
  if (config_.kv_type != KvType::kF16) {
    EDGE_ASSIGN(tiles_, TileAttention::create(config_, tile_options(options), kernels_, pool_, budget));
  } else if (options.score_rows > 0) {
    EDGE_ASSIGN(score_memory_, budget.reserve(stream_bytes(config_, options, pool_.size()), "attention scores"));
  } else {
    EDGE_ASSIGN(row_attention_, RowAttention::create(config_, options.context, kernels_, pool_, budget));
  }
  acts_ = std::make_unique<ActRows>(kernels_, pool_, scratch_.acts);
  for (const LayerWeights& layer : weights_.layers) {
    if (layer.neuron_records == kNoWeight) continue;
    if (store_.neurons() == nullptr) {
      return error(Code::kBadArgument, "store plan: %s: expected slots for its neurons, found none",
                   directory_.entry(layer.neuron_records).name.c_str());
    }
    if (sparse_ == nullptr) {
      sparse_ = std::make_unique<SparseFfn>(config_, directory_, store_, *store_.neurons(), kernels_, pool_, linear_,
                                            *acts_, scratch_, price_);
      sparse_->keep_thresholds(std::move(thresholds_));
    }
    EDGE_TRY(sparse_->add(layer));
  }
  return {};
}

Status Decoder::forward(const Batch& batch, KvCache& kv) {
  const BatchPart part{&kv, static_cast<int64_t>(batch.tokens.size())};
  return forward(batch, {&part, 1});
}

Status Decoder::forward(const Batch& batch, std::span<const BatchPart> parts) {
  EDGE_TRY(check(batch, parts));
  EDGE_TRY(stage(parts));
  place(batch, parts);
  if (options_.score_rows > 0) start_stream(*parts.front().kv);
  Status status = embed(batch);
  for (int64_t layer = 0; status.ok() && layer < config_.n_layers; ++layer) {
    if (interrupted && interrupted()) {
      status = error(Code::kCancelled, "cancelled in layer %lld", static_cast<long long>(layer));
      break;
    }
    const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
    status = attention(layer);
    if (!status.ok()) break;
    status = norm(weights.ffn_norm, weights.ffn_norm_bias, scratch_.hidden, pad16(config_.hidden_size), n_rows_,
                  scratch_.normed);
    if (!status.ok()) break;
    if (weights.neuron_records != kNoWeight) {
      status = by_neuron(layer);
    } else {
      status = weights.experts.empty() ? ffn(weights, scratch_.normed, n_rows_, scratch_.projected)
                                       : mixture(weights, scratch_.normed);
    }
    if (!status.ok()) break;
    kernels_.add(scratch_.projected, n_rows_ * pad16(config_.hidden_size), scratch_.hidden);
  }
  if (!status.ok()) {
    for (const BatchPart& part : parts) part.kv->rollback();
    store_.rewind();
  }
  return status;
}

Status Decoder::stage(std::span<const BatchPart> parts) {
  for (const BatchPart& part : parts) {
    const Status status = part.kv->stage(part.n_rows);
    if (status.ok()) continue;
    for (const BatchPart& other : parts) other.kv->rollback();
    return status;
  }
  return {};
}

Status Decoder::by_neuron(int64_t layer) {
  const int64_t stride = pad16(config_.hidden_size);
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  SparseFfn::Ahead ahead;
  if (layer + 1 < config_.n_layers && 2 * n_rows_ <= max_rows()) {
    const LayerWeights& next = weights_.layers[static_cast<size_t>(layer + 1)];
    if (sparse_->looks_ahead(next, n_rows_)) {
      ahead = {&next, scratch_.normed + n_rows_ * stride};
      EDGE_TRY(norm(next.ffn_norm, next.ffn_norm_bias, scratch_.hidden, stride, n_rows_,
                    scratch_.normed + n_rows_ * stride));
    }
  }
  return sparse_->run(weights, scratch_.normed, n_rows_, scratch_.projected, watch_ffn, ahead);
}

void Decoder::commit(std::span<const int32_t> path, KvCache& kv) {
  kv.commit(path);
  store_.commit(path);
}

void Decoder::commit_all(KvCache& kv) {
  const BatchPart part{&kv, kv.n_staged()};
  commit_all({&part, 1});
}

void Decoder::commit_all(std::span<const BatchPart> parts) {
  for (const BatchPart& part : parts) part.kv->commit_all();
  std::vector<int32_t> path(static_cast<size_t>(n_rows_));
  std::iota(path.begin(), path.end(), 0);
  store_.commit(path);
}

Status Decoder::check(const Batch& batch, std::span<const BatchPart> parts) const {
  if (acts_ == nullptr) return error(Code::kBadArgument, "forward: the decoder has given its memory back");
  const int64_t n_rows = static_cast<int64_t>(batch.tokens.size());
  if (n_rows < 1 || n_rows > options_.max_rows || batch.parents.size() != batch.tokens.size()) {
    return error(Code::kBadArgument, "forward: expected 1..%lld rows with a parent each, found %lld rows, %zu parents",
                 static_cast<long long>(options_.max_rows), static_cast<long long>(n_rows), batch.parents.size());
  }
  if (parts.size() > 1 && options_.score_rows > 0) {
    return error(Code::kUnsupported, "forward: keys and values on a drive: expected one text in a pass, found %zu",
                 parts.size());
  }
  int64_t first_row = 0;
  for (const BatchPart& part : parts) {
    EDGE_TRY(check_part(batch, part, first_row));
    first_row += part.n_rows;
  }
  if (first_row != n_rows) {
    return error(Code::kBadArgument, "forward: expected parts of %lld rows together, found %lld",
                 static_cast<long long>(n_rows), static_cast<long long>(first_row));
  }
  return {};
}

Status Decoder::check_part(const Batch& batch, const BatchPart& part, int64_t first_row) const {
  const int64_t left = static_cast<int64_t>(batch.tokens.size()) - first_row;
  if (part.n_rows < 1 || part.n_rows > left) {
    return error(Code::kBadArgument, "forward: expected a part of 1..%lld rows, found %lld", static_cast<long long>(left),
                 static_cast<long long>(part.n_rows));
  }
  if (part.kv->n_committed() + part.n_rows > options_.context) {
    return error(Code::kContextOverflow, "forward: %lld tokens, the context holds %lld",
                 static_cast<long long>(part.kv->n_committed() + part.n_rows), static_cast<long long>(options_.context));
  }
  for (int64_t i = first_row; i < first_row + part.n_rows; ++i) {
    const int32_t token = batch.tokens[static_cast<size_t>(i)], parent = batch.parents[static_cast<size_t>(i)];
    if (token < 0 || token >= config_.vocab_size) {
      return error(Code::kBadArgument, "token %lld: expected an id in 0..%lld, found %d", static_cast<long long>(i),
                   static_cast<long long>(config_.vocab_size - 1), token);
    }
    if (parent < -1 || parent >= i || (parent >= 0 && parent < first_row)) {
      return error(Code::kBadArgument, "parent of row %lld: expected -1 or %lld..%lld, found %d", static_cast<long long>(i),
                   static_cast<long long>(first_row), static_cast<long long>(i) - 1, parent);
    }
  }
  return {};
}

void Decoder::place(const Batch& batch, std::span<const BatchPart> parts) {
  n_rows_ = static_cast<int64_t>(batch.tokens.size());
  homes_.clear();
  for (const BatchPart& part : parts) {
    homes_.insert(homes_.end(), static_cast<size_t>(part.n_rows), {part.kv, static_cast<int64_t>(homes_.size())});
  }
  mask_words_ = (n_rows_ + 63) / 64;
  positions_.assign(static_cast<size_t>(n_rows_), 0);
  visible_.assign(static_cast<size_t>(n_rows_ * mask_words_), 0);
  const int64_t half = static_cast<int64_t>(config_.rope_inv_freq.size());
  for (int64_t row = 0; row < n_rows_; ++row) {
    const int32_t parent = batch.parents[static_cast<size_t>(row)];
    uint64_t* mask = visible_.data() + row * mask_words_;
    positions_[row] = parent < 0 ? homes_[row].kv->n_committed() : positions_[parent] + 1;
    if (parent >= 0) std::copy_n(visible_.data() + parent * mask_words_, mask_words_, mask);
    mask[row / 64] |= uint64_t{1} << (row % 64);
    for (int64_t i = 0; i < half; ++i) {
      // The angle in f32, as the reference implementations have it.
      const float angle = static_cast<float>(positions_[row]) * config_.rope_inv_freq[static_cast<size_t>(i)];
      scratch_.cos[row * half + i] = std::cos(angle) * config_.rope_magnitude;
      scratch_.sin[row * half + i] = std::sin(angle) * config_.rope_magnitude;
    }
  }
}

Status Decoder::embed(const Batch& batch) {
  const int64_t hidden = config_.hidden_size, stride = pad16(hidden);
  // One lease per row: a view where the table is resident, one small read where it is not.
  const auto gather = [&](WeightId weight, std::span<const int32_t> rows, bool accumulate) -> Status {
    const PackEntry& entry = directory_.entry(weight);
    for (size_t i = 0; i < rows.size(); ++i) {
      EDGE_ASSIGN(Lease lease, store_.acquire(weight, rows.subspan(i, 1)));
      float* into = scratch_.hidden + static_cast<int64_t>(i) * stride;
      float* out = accumulate ? scratch_.normed : into;
      decode_tile_row(entry.format, lease.data(), rows[i] % kTileRows, hidden, out);
      if (accumulate) kernels_.add(out, hidden, into);
    }
    return {};
  };
  EDGE_TRY(gather(weights_.embed, batch.tokens, false));
  if (weights_.embed_position == kNoWeight) return {};
  std::vector<int32_t> rows;
  for (int64_t position : positions_) rows.push_back(static_cast<int32_t>(position + config_.position_offset));
  const int64_t n_positions = directory_.entry(weights_.embed_position).rows;
  if (*std::max_element(rows.begin(), rows.end()) >= n_positions) {
    return error(Code::kContextOverflow, "position %lld: the model has learned %lld positions",
                 static_cast<long long>(positions_.back()), static_cast<long long>(n_positions - config_.position_offset));
  }
  return gather(weights_.embed_position, rows, true);
}

Status Decoder::norm(WeightId weight_id, WeightId bias_id, const float* x, int64_t x_stride, int64_t n_rows,
                     float* out) {
  EDGE_ASSIGN(const float* weight, linear_.vector(weight_id));
  EDGE_ASSIGN(const float* bias, linear_.vector(bias_id));
  const int64_t n = config_.hidden_size, out_stride = pad16(n);
  pool_.parallel(n_rows, row_grain(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      if (config_.norm == Norm::kRms) {
        kernels_.rms_norm(x + row * x_stride, weight, config_.norm_eps, n, out + row * out_stride);
      } else {
        kernels_.layer_norm(x + row * x_stride, weight, bias, config_.norm_eps, n, out + row * out_stride);
      }
    }
  });
  return {};
}

Status Decoder::hidden(int32_t row, std::span<float> out) {
  EDGE_TRY(norm(weights_.final_norm, weights_.final_norm_bias, scratch_.hidden + row * pad16(config_.hidden_size),
                pad16(config_.hidden_size), 1, scratch_.normed));
  std::copy_n(scratch_.normed, config_.hidden_size, out.data());
  return {};
}

Status Decoder::project(const float* states, int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(states + i * config_.hidden_size, config_.hidden_size,
                scratch_.normed + i * pad16(config_.hidden_size));
  }
  return head_product(n, 0, visit);
}

Status Decoder::logits(std::span<const int32_t> rows, const Visit& visit) {
  if (rows.empty()) return {};
  const int64_t stride = pad16(config_.hidden_size);
  // Held over all groups of rows: a streamed head that has passed comes again only after a whole pass.
  EDGE_ASSIGN(const Lease head_lease, store_.acquire(weights_.head, {}));
  for (size_t begin = 0; begin < rows.size(); begin += Scratch::kLogitRows) {
    const auto piece = rows.subspan(begin, std::min<size_t>(Scratch::kLogitRows, rows.size() - begin));
    const int64_t n = static_cast<int64_t>(piece.size());
    for (int64_t i = 0; i < n; ++i) {
      EDGE_TRY(norm(weights_.final_norm, weights_.final_norm_bias, scratch_.hidden + piece[i] * stride, stride, 1,
                    scratch_.normed + i * stride));
    }
    EDGE_TRY(head_product(n, begin, visit));
  }
  return {};
}

Status Decoder::head_product(int64_t n, size_t first, const Visit& visit) {
  const int64_t vocab = pad16(config_.vocab_size);
  acts_->set(scratch_.normed, pad16(config_.hidden_size), n, config_.hidden_size);
  const Product head{weights_.head, scratch_.logits, vocab};
  EDGE_TRY(linear_.run(*acts_, {&head, 1}));
  for (int64_t i = 0; i < n; ++i) {
    float* logits = scratch_.logits + i * vocab;
    if (config_.logit_scale != 1.0f) {
      for (int64_t j = 0; j < config_.vocab_size; ++j) logits[j] *= config_.logit_scale;
    }
    EDGE_TRY(visit(first + static_cast<size_t>(i), {logits, static_cast<size_t>(config_.vocab_size)}));
  }
  return {};
}

}  // namespace edge
