// Attention over keys and values that arrive in ranges: one softmax over all scores of a row, the steps of
// kernels/ops_attention.h over the same keys in the same order, so the bits are those of attention over resident pages.
#include <algorithm>
#include <bit>

#include "model/decoder.h"

namespace edge {
namespace {

uint64_t score_bytes(const DecoderConfig& config, const DecoderOptions& options) {
  return round_up(static_cast<uint64_t>(options.score_rows * config.n_heads * options.context) * sizeof(float), 64);
}

// Key or value rows of one range, per thread.
int64_t n_pointers(const DecoderOptions& options) { return std::max(options.range_tokens, options.max_rows); }

}  // namespace

uint64_t Decoder::stream_bytes(const DecoderConfig& config, const DecoderOptions& options, int n_threads) {
  if (options.score_rows == 0 || config.kv_type != KvType::kF16) return 0;
  const uint64_t pointers = static_cast<uint64_t>(n_threads * n_pointers(options)) * sizeof(const uint16_t*);
  return round_up(score_bytes(config, options) + pointers, kReadAlign);  // a block of its own
}

void Decoder::start_stream(KvCache& kv) {
  const int64_t n_committed = kv.n_committed();
  const int64_t n_read = tiles_ != nullptr ? TileAttention::whole_tokens(n_committed) : n_committed;
  std::vector<int64_t> first_slots;
  // No row of the batch stands before the first free slot.
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) first_slots.push_back(config_.first_visible(layer, n_committed));
  const int64_t n_blocks = (n_rows_ + options_.score_rows - 1) / options_.score_rows;
  kv.pool().stream()->start(kv.pages(), n_read, std::move(first_slots), n_blocks);
}

// One block of rows whose scores fit the scratch: all keys pass by, then all values.
Status Decoder::attend_block(int64_t index, KvCache& kv, int64_t row_begin, int64_t row_end) {
  const int64_t head_dim = config_.head_dim, n_kv_heads = config_.n_kv_heads, group = config_.n_heads / n_kv_heads;
  const int64_t n_committed = kv.n_committed();
  const KvShape& shape = kv.pool().shape();
  float* const scores = score_memory_.as<float>();
  const uint16_t** const pointers =
      reinterpret_cast<const uint16_t**>(score_memory_.data() + score_bytes(config_, options_));

  // Calls fn(args, row, rows, offset): rows, the pointers of this thread; offset, of the KV head inside a row.
  const auto for_items = [&](auto&& fn) {
    pool_.parallel((row_end - row_begin) * n_kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = row_begin + item / n_kv_heads, kv_head = item % n_kv_heads;
        const int64_t at = row * pad16(config_.q_dim()) + kv_head * group * head_dim;
        const int64_t n_past = n_committed - std::min(n_committed, config_.first_visible(index, positions_[row]));
        AttentionArgs args = {};
        args.q = scratch_.q + at;
        args.group = group;
        args.head_dim = head_dim;
        args.n_visible = n_past + n_staged_visible(index, row);
        args.scale = config_.attention_scale;
        args.scores = scores + item * group * options_.context;
        args.stride = args.n_visible;
        args.out = scratch_.attended + at;
        fn(args, row, pointers + thread * n_pointers(options_), kv_head * head_dim);
      }
    });
  };
  // The rows of the batch, which follow the committed ones in every row's view.
  const auto staged = [&](AttentionArgs& args, int64_t row, const uint16_t** rows, int64_t offset, KvHalf half) {
    const int64_t first = config_.first_visible(index, positions_[row]);
    const uint64_t* mask = visible_.data() + row * mask_words_;
    args.n = 0;
    for (int64_t word = 0; word < mask_words_; ++word) {
      for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
        const int64_t other = word * 64 + std::countr_zero(bits);
        const int64_t slot = n_committed + other;
        if (positions_[other] < first) continue;
        rows[args.n++] = (half == kKeys ? kv.key(index, slot) : kv.value(index, slot)) + offset;
      }
    }
    args.first = args.n_visible - args.n;
    (half == kKeys ? args.k : args.v) = rows;
  };
  const auto past = [&](const KvRange& range, AttentionArgs& args, int64_t row, const uint16_t** rows,
                        int64_t offset) {
    const int64_t first = std::min(n_committed, config_.first_visible(index, positions_[row]));
    const int64_t first_page = range.begin / shape.page_tokens;
    args.n = 0;
    for (int64_t slot = std::max(range.begin, first); slot < range.end; ++slot) {
      const int64_t page = slot / shape.page_tokens;
      const uint16_t* half =
          range.data != nullptr
              ? reinterpret_cast<const uint16_t*>(range.data + static_cast<uint64_t>(page - first_page) * shape.half_bytes())
              : kv.pool().rows(kv.pages()[static_cast<size_t>(page)].frame, index, range.half);
      rows[args.n++] = half + slot % shape.page_tokens * shape.kv_dim + offset;
    }
    args.first = std::max(range.begin, first) - first;
    (range.half == kKeys ? args.k : args.v) = rows;
  };
  const auto stream = [&](void (*step)(const AttentionArgs&)) -> Status {
    for (int64_t slot = config_.first_visible(index, n_committed); slot < n_committed;) {
      EDGE_ASSIGN(const KvRange range, kv.pool().stream()->next(pool_));
      for_items([&](AttentionArgs& args, int64_t row, const uint16_t** rows, int64_t offset) {
        past(range, args, row, rows, offset);
        if (args.n > 0) step(args);
      });
      slot = range.end;
    }
    return {};
  };

  for_items([&](AttentionArgs& args, int64_t row, const uint16_t** rows, int64_t offset) {
    kernels_.attention_begin(args);
    staged(args, row, rows, offset, kKeys);
    kernels_.attention_scores(args);
  });
  EDGE_TRY(stream(kernels_.attention_scores));
  for_items([&](AttentionArgs& args, int64_t, const uint16_t**, int64_t) { kernels_.attention_weigh(args); });
  EDGE_TRY(stream(kernels_.attention_values));
  for_items([&](AttentionArgs& args, int64_t row, const uint16_t** rows, int64_t offset) {
    staged(args, row, rows, offset, kValues);
    kernels_.attention_values(args);
  });
  return {};
}

int64_t Decoder::n_staged_visible(int64_t layer, int64_t row) const {
  const int64_t first = config_.first_visible(layer, positions_[row]);
  const uint64_t* mask = visible_.data() + row * mask_words_;
  int64_t n = 0;
  for (int64_t word = 0; word < mask_words_; ++word) {
    for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
      if (positions_[word * 64 + std::countr_zero(bits)] >= first) ++n;
    }
  }
  return n;
}

Status Decoder::attend_streamed(int64_t index, KvCache& kv) {
  for (int64_t row = 0; row < n_rows_; row += options_.score_rows) {
    EDGE_TRY(attend_block(index, kv, row, std::min(n_rows_, row + options_.score_rows)));
  }
  return {};
}

}  // namespace edge
