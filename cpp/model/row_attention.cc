#include "model/row_attention.h"

#include <algorithm>
#include <array>
#include <bit>
#include <span>

#include "model/carver.h"

namespace edge {
namespace {

// Scores that more than one row may fill: with those of a long context a block has fewer rows, and stays in the caches.
constexpr int64_t kScores = 32 << 10;
// Less than about a microsecond is done before another core has noticed: products of a query's value with a key's.
constexpr int64_t kPieceProducts = 32 << 10;

int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }

// Keys of slots [begin, end), one KV row each.
void list_keys(KvCache& kv, int64_t layer, int64_t begin, int64_t end, const uint16_t** keys) {
  const int64_t page_tokens = kv.pool().shape().page_tokens, kv_dim = kv.pool().shape().kv_dim;
  for (int64_t slot = begin; slot < end;) {
    const uint16_t* const key = kv.key(layer, slot);
    const int64_t n = std::min(end, (slot / page_tokens + 1) * page_tokens) - slot;
    for (int64_t i = 0; i < n; ++i) keys[i] = key + i * kv_dim;
    keys += n;
    slot += n;
  }
}

}  // namespace

RowAttention::RowAttention(const DecoderConfig& config, int64_t context, const Kernels& kernels, ThreadPool& pool)
    : config_(config), context_(context), kernels_(kernels), pool_(pool), group_(config.n_heads / config.n_kv_heads) {}

uint64_t RowAttention::bytes(const DecoderConfig& config, int64_t context, int n_threads) {
  ThreadPool none(1);
  const Kernels kernels = {};
  const RowAttention sizes(config, context, kernels, none);
  Work work;
  return round_up(sizes.carve(nullptr, &work) * static_cast<uint64_t>(n_threads), kReadAlign);  // a block of its own
}

Result<std::unique_ptr<RowAttention>> RowAttention::create(const DecoderConfig& config, int64_t context,
                                                           const Kernels& kernels, ThreadPool& pool, Budget& budget) {
  std::unique_ptr<RowAttention> made(new RowAttention(config, context, kernels, pool));
  EDGE_ASSIGN(made->memory_, budget.reserve(bytes(config, context, pool.size()), "attention"));
  made->works_.resize(static_cast<size_t>(pool.size()));
  std::byte* at = made->memory_.data();
  for (Work& work : made->works_) at += made->carve(at, &work);
  return made;
}

int64_t RowAttention::n_scores() const {
  const int64_t width = pad16(context_);
  return std::max(group_ * width, std::min(kSharedHeads * width, kScores));
}

uint64_t RowAttention::carve(std::byte* base, Work* work) const {
  Carver carver(base);
  work->scores = carver.floats(n_scores());
  work->out = carver.floats(std::max(group_, kSharedHeads) * config_.head_dim);
  work->keys = carver.array<const uint16_t*>(context_);
  return carver.used();
}

// As many rows as fill the register tiles, while there is room for their scores and a block for every thread.
int64_t RowAttention::rows_per_block(int64_t n_rows, int64_t n_columns) const {
  const int64_t fit = n_scores() / (group_ * pad16(n_columns));
  const int64_t busy = n_rows * config_.n_kv_heads / pool_.size();
  return std::max<int64_t>(1, std::min({kSharedHeads / group_, fit, busy}));
}

void RowAttention::divide(const BatchRows& rows, int64_t layer, int64_t most_rows) {
  blocks_.clear();
  // A row whose window begins among the staged ones stands alone.
  const auto alone = [&](int64_t row) {
    return config_.first_visible(layer, rows.positions[row]) > rows.homes[row].kv->n_committed();
  };
  for (int64_t row = 0; row < rows.n_rows;) {
    int64_t end = row + 1;
    while (end < rows.n_rows && rows.homes[end].kv == rows.homes[row].kv) ++end;
    const int64_t n_blocks = (end - row + most_rows - 1) / most_rows, most = (end - row + n_blocks - 1) / n_blocks;
    while (row < end) {
      int64_t n = 1;
      while (!alone(row) && n < most && row + n < end && !alone(row + n)) ++n;
      blocks_.push_back(block_of(rows, layer, row, n));
      row += n;
    }
  }
}

RowAttention::RowBlock RowAttention::block_of(const BatchRows& rows, int64_t layer, int64_t row, int64_t n_rows) const {
  RowBlock block{row, n_rows};
  const int64_t n_committed = rows.homes[row].kv->n_committed();
  int64_t last_first = 0, end = 0;
  block.first = n_committed;
  for (int64_t i = row; i < row + n_rows; ++i) {
    const int64_t first = std::min(n_committed, config_.first_visible(layer, rows.positions[i]));
    block.first = std::min(block.first, first);
    last_first = std::max(last_first, first);
    end = std::max(end, rows.positions[i] + 1);
  }
  block.n_columns = end - block.first;
  block.shared_begin = last_first - block.first;
  block.n_shared_staged = rows.n_rows;
  for (int64_t word = 0; word < rows.mask_words; ++word) {
    uint64_t all = ~uint64_t{0}, any = 0;
    for (int64_t i = row; i < row + n_rows; ++i) {
      const uint64_t mask = rows.visible[i * rows.mask_words + word];
      all &= mask;
      any |= mask;
    }
    if (all == any) continue;
    block.n_shared_staged = word * 64 + std::countr_zero(all ^ any);
    break;
  }
  return block;
}

void RowAttention::attend(const BatchRows& rows, int64_t layer, const float* q, float* out, int64_t stride) {
  const auto [least, most] = std::minmax_element(rows.positions, rows.positions + rows.n_rows);
  const int64_t n_columns = *most + 1 - config_.first_visible(layer, *least);
  const int64_t most_rows = rows_per_block(rows.n_rows, n_columns);
  divide(rows, layer, most_rows);
  const Inputs in{rows, layer, q, out, stride};
  const int64_t products = std::min(most_rows, rows.n_rows) * group_ * n_columns * config_.head_dim;
  const int64_t n_items = static_cast<int64_t>(blocks_.size()) * config_.n_kv_heads;
  pool_.parallel(n_items, std::max<int64_t>(1, kPieceProducts / products), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t item = begin; item < end; ++item) {
      attend_block(in, blocks_[static_cast<size_t>(item / config_.n_kv_heads)], item % config_.n_kv_heads,
                   works_[static_cast<size_t>(thread)]);
    }
  });
}

// Appends the batch's rows [begin, end) that `row` sees to the columns; the number of columns then.
int64_t RowAttention::list_staged(const Inputs& in, int64_t row, int64_t begin, int64_t end, const uint16_t** keys,
                                  int64_t column) const {
  const RowHome& home = in.rows.homes[row];
  const int64_t first = config_.first_visible(in.layer, in.rows.positions[row]);
  in.rows.for_visible(row, [&](int64_t other) {
    if (other < begin || other >= end || in.rows.positions[other] < first) return;
    keys[column++] = home.kv->key(in.layer, home.slot(other));
  });
  return column;
}

void RowAttention::attend_block(const Inputs& in, const RowBlock& block, int64_t kv_head, const Work& work) const {
  const RowHome& home = in.rows.homes[block.row];
  const int64_t n_committed = home.kv->n_committed(), head_dim = config_.head_dim, row_floats = group_ * head_dim;
  const int64_t at = block.row * in.stride + kv_head * row_floats;
  list_keys(*home.kv, in.layer, block.first, n_committed, work.keys);
  const int64_t shared_end =
      list_staged(in, block.row, 0, block.n_shared_staged, work.keys, n_committed - block.first);

  AttentionArgs all = {};
  all.group = block.n_rows * group_;
  all.head_dim = head_dim;
  all.k_at = kv_head * head_dim;
  all.v_at = home.kv->value(in.layer, n_committed) - home.kv->key(in.layer, n_committed) + all.k_at;  // of any slot
  all.scale = config_.attention_scale;
  all.scores = work.scores;
  all.stride = pad16(block.n_columns);
  all.out = work.out;
  std::array<RowPart, kSharedHeads> parts;
  for (int64_t i = 0; i < block.n_rows; ++i) {
    RowPart& part = parts[static_cast<size_t>(i)];
    const int64_t row = block.row + i, first = config_.first_visible(in.layer, in.rows.positions[row]);
    part.row = row;
    part.begin = std::min(n_committed, first) - block.first;
    part.args = all;
    part.args.group = group_;
    part.args.n_visible = in.rows.positions[row] + 1 - first;
    part.args.q = in.q + at + i * in.stride;
    part.args.scores += i * group_ * all.stride + part.begin;
    part.args.out += i * row_floats;
  }
  const std::span<RowPart> rows(parts.data(), static_cast<size_t>(block.n_rows));

  // Over columns [begin, end), of which args.scores has column `base` first.
  const auto over = [&](Step step, AttentionArgs& args, int64_t base, int64_t begin, int64_t end) {
    if (begin >= end) return;
    args.k = args.v = work.keys + begin;
    args.first = begin - base;
    args.n = end - begin;
    step(args);
  };
  const auto over_all = [&](Step step) {
    for (RowPart& part : rows) over(step, part.args, part.begin, part.begin, block.shared_begin);
    over(step, all, 0, block.shared_begin, shared_end);
    for (RowPart& part : rows) {
      const int64_t end =
          list_staged(in, part.row, block.n_shared_staged, in.rows.n_rows, work.keys, shared_end);
      over(step, part.args, part.begin, shared_end, end);
    }
  };
  for (RowPart& part : rows) kernels_.attention_begin(part.args);
  over_all(kernels_.attention_scores);
  for (RowPart& part : rows) kernels_.attention_weigh(part.args);
  over_all(kernels_.attention_values);
  for (int64_t i = 0; i < block.n_rows; ++i) {
    std::copy_n(work.out + i * row_floats, row_floats, in.out + at + i * in.stride);
  }
}

}  // namespace edge
