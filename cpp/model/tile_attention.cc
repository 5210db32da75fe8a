#include "model/tile_attention.h"

#include <algorithm>

#include "model/carver.h"

namespace edge {

TileAttention::TileAttention(const DecoderConfig& config, const TileAttentionOptions& options, const Kernels& kernels,
                             ThreadPool& pool)
    : config_(config), options_(options), kernels_(kernels), steps_(kernels.tiles.of(config.kv_type)), pool_(pool),
      layout_{config.kv_type, config.head_dim}, group_(config.n_heads / config.n_kv_heads) {}

uint64_t TileAttention::bytes(const DecoderConfig& config, const TileAttentionOptions& options, int n_threads) {
  ThreadPool none(1);
  const Kernels kernels = {};
  TileAttention sizes(config, options, kernels, none);
  return sizes.carve(nullptr, n_threads);
}

Result<std::unique_ptr<TileAttention>> TileAttention::create(const DecoderConfig& config,
                                                             const TileAttentionOptions& options,
                                                             const Kernels& kernels, ThreadPool& pool, Budget& budget) {
  std::unique_ptr<TileAttention> made(new TileAttention(config, options, kernels, pool));
  EDGE_ASSIGN(made->memory_, budget.reserve(made->carve(nullptr, pool.size()), "attention"));
  made->carve(made->memory_.data(), pool.size());
  return made;
}

uint64_t TileAttention::carve(std::byte* base, int n_threads) {
  Carver carver(base);
  const int64_t padded = layout_.padded(), n_queries = options_.max_rows * config_.n_heads;
  queries_ = reinterpret_cast<int8_t*>(carver.take(static_cast<uint64_t>(n_queries * padded)));
  query_scales_ = carver.floats(n_queries);
  query_sums_ = carver.array<int32_t>(n_queries);
  if (!is_streamed()) {
    found_ = carver.array<SegmentSum>(n_segments() * config_.n_heads);
    found_sums_ = carver.array<int32_t>(n_segments() * config_.n_heads * padded);
  }
  work_bytes_ = work(nullptr).bytes;
  const int64_t n_works = is_streamed() ? options_.score_rows * config_.n_kv_heads : n_threads;
  works_ = carver.take(static_cast<uint64_t>(n_works) * work_bytes_);
  staged_ = carver.take(static_cast<uint64_t>(n_threads * 2 * max_staged() * layout_.bytes()));
  return (carver.used() + kReadAlign - 1) / kReadAlign * kReadAlign;
}

TileAttention::Work TileAttention::work(std::byte* at) const {
  Carver carver(at);
  Work work;
  work.stride = is_streamed() ? n_segments() * kKvSegment : kKvSegment;
  work.scores = carver.floats(group_ * work.stride);
  work.value_scales = carver.floats(work.stride);
  work.segments = carver.array<SegmentSum>(work.stride / kKvSegment * group_);
  work.sums = carver.array<int32_t>(group_ * layout_.padded());
  work.state = carver.array<AttentionState>(group_);
  work.out = carver.floats(group_ * layout_.padded());
  work.tiles = carver.array<const std::byte*>(kKvSegment / kKvTileTokens);
  work.tail = carver.array<const uint16_t*>(2 * KvShape::kTailTokens);
  work.bytes = carver.used();
  return work;
}

void TileAttention::put(const BatchRows& rows, int64_t layer, int64_t row, float* q, float* k, float* v) {
  const int64_t head_dim = config_.head_dim, padded = layout_.padded();
  const bool rotates = config_.kv_type == KvType::kInt4;
  const RowHome& home = rows.homes[row];
  const int64_t slot = home.slot(row), lane = slot % kKvTileTokens;
  std::byte* const keys = home.kv->group(layer, kKeys, slot);
  std::byte* const values = home.kv->group(layer, kValues, slot);
  for (int64_t head = 0; head < config_.n_kv_heads; ++head) {
    float *key = k + head * head_dim, *value = v + head * head_dim;
    if (rotates) kv_rotate(key, head_dim);
    if (rotates) kv_rotate(value, head_dim);
    kv_store(layout_, key, value, lane, keys + head * layout_.bytes(), values + head * layout_.bytes());
  }
  if (rotates) {
    kernels_.to_f16(k, config_.kv_dim(), home.kv->tail(layer, kKeys, slot));
    kernels_.to_f16(v, config_.kv_dim(), home.kv->tail(layer, kValues, slot));
  }
  for (int64_t head = 0; head < config_.n_heads; ++head) {
    const int64_t at = row * config_.n_heads + head;
    if (rotates) kv_rotate(q + head * head_dim, head_dim);
    kv_round_query(q + head * head_dim, head_dim, queries_ + at * padded, query_scales_ + at, query_sums_ + at);
    query_scales_[at] *= config_.attention_scale;
  }
}

TileAttention::View TileAttention::view(const BatchRows& rows, int64_t layer, int64_t row, int64_t head) const {
  View view;
  view.kv = rows.homes[row].kv;
  view.layer = layer;
  view.row = row;
  view.head = head;
  view.position = rows.positions[row];
  view.first = config_.first_visible(layer, view.position);
  view.end = KvShape::tail_begin(config_.kv_type, view.position);
  view.copied = view.end;
  return view;
}

void TileAttention::copy_staged(const BatchRows& rows, std::byte* staged, View* view) const {
  const RowHome& home = rows.homes[view->row];
  const int64_t n_committed = view->kv->n_committed();
  // Rows of a chain stand where their positions are.
  if (view->position == home.slot(view->row) || view->end <= n_committed) return;
  view->copied = n_committed / kKvTileTokens * kKvTileTokens;
  view->staged = staged;
  const int64_t at = view->head * layout_.bytes();
  const auto copy = [&](int64_t slot, int64_t position) {
    std::byte* const keys = staged + (position - view->copied) / kKvTileTokens * 2 * layout_.bytes();
    kv_copy(layout_, view->kv->group(view->layer, kKeys, slot) + at, view->kv->group(view->layer, kValues, slot) + at,
            slot % kKvTileTokens, keys, keys + layout_.bytes(), position % kKvTileTokens);
  };
  for (int64_t slot = view->copied; slot < n_committed; ++slot) copy(slot, slot);
  rows.for_visible(view->row, [&](int64_t other) {
    if (rows.positions[other] < view->end) copy(home.slot(other), rows.positions[other]);
  });
}

const std::byte* TileAttention::tile(const View& view, KvHalf half, int64_t position) const {
  if (position >= view.copied && view.staged != nullptr) {
    return view.staged + ((position - view.copied) / kKvTileTokens * 2 + half) * layout_.bytes();
  }
  return view.kv->group(view.layer, half, position) + view.head * layout_.bytes();
}

TileArgs TileAttention::args(const View& view, const Work& work) const {
  TileArgs args;
  const int64_t at = view.row * config_.n_heads + view.head * group_;
  args.q = queries_ + at * layout_.padded();
  args.q_scales = query_scales_ + at;
  args.q_sums = query_sums_ + at;
  args.group = group_;
  args.layout = layout_;
  args.stride = work.stride;
  args.tiles = work.tiles;
  return args;
}

void TileAttention::attend_segment(const View& view, int64_t segment, const Work& work, SegmentSum* found,
                                   int32_t* sums) const {
  const int64_t first = std::max(view.first, segment * kKvSegment);
  const int64_t end = std::min(view.end, (segment + 1) * kKvSegment);
  const int64_t begin = first / kKvTileTokens * kKvTileTokens;
  TileArgs a = args(view, work);
  a.first = first - begin;
  a.end = end - begin;
  a.n_tiles = (a.end + kKvTileTokens - 1) / kKvTileTokens;
  const auto fetch = [&](KvHalf half) {
    for (int64_t i = 0; i < a.n_tiles; ++i) work.tiles[i] = tile(view, half, begin + i * kKvTileTokens);
  };
  fetch(kKeys);
  a.scores = work.scores;
  a.value_scales = work.value_scales;
  steps_.scores(a);
  for (int64_t h = 0; h < group_; ++h) {
    found[h] = steps_.weigh(work.scores + h * work.stride, a.n_tiles * kKvTileTokens, work.value_scales);
  }
  fetch(kValues);
  a.weights = reinterpret_cast<const int16_t*>(work.scores);
  a.weight_stride = 2 * work.stride;
  a.sums = sums;
  std::fill_n(sums, group_ * layout_.padded(), 0);
  steps_.values(a);
}

void TileAttention::merge(const SegmentSum* found, const int32_t* sums, const Work& work) const {
  const int64_t padded = layout_.padded();
  for (int64_t h = 0; h < group_; ++h) {
    steps_.merge(found[h], sums + h * padded, padded, work.state + h, work.out + h * padded);
  }
}

void TileAttention::reset(const Work& work) const {
  std::fill_n(work.state, group_, AttentionState{});
  std::fill_n(work.out, group_ * layout_.padded(), 0.0f);
}

void TileAttention::attend_tail(const BatchRows& rows, const View& view, const Rows& at, const Work& work) const {
  const int64_t begin = std::max(view.first, view.end), offset = view.head * config_.head_dim;
  if (begin > view.position) return;
  const RowHome& home = rows.homes[view.row];
  int64_t n = 0;
  const auto see = [&](int64_t slot) {
    work.tail[n] = view.kv->tail(view.layer, kKeys, slot) + offset;
    work.tail[KvShape::kTailTokens + n++] = view.kv->tail(view.layer, kValues, slot) + offset;
  };
  for (int64_t slot = begin; slot < view.kv->n_committed(); ++slot) see(slot);
  rows.for_visible(view.row, [&](int64_t other) {
    if (rows.positions[other] >= begin) see(home.slot(other));
  });
  AttentionArgs a = {};
  a.q = at.q + view.row * at.stride + view.head * group_ * config_.head_dim;
  a.group = group_;
  a.head_dim = config_.head_dim;
  a.k = work.tail;
  a.v = work.tail + KvShape::kTailTokens;
  a.n_visible = n;
  a.scale = config_.attention_scale;
  a.scores = work.scores;
  a.stride = n;
  a.out = reinterpret_cast<float*>(work.sums);
  kernels_.tiles.add_rows(a, work.state, work.out, layout_.padded());
}

void TileAttention::finish(const View& view, const Rows& at, const Work& work) const {
  const int64_t head_dim = config_.head_dim;
  for (int64_t h = 0; h < group_; ++h) {
    float* const out = at.out + view.row * at.stride + (view.head * group_ + h) * head_dim;
    const float* const sums = work.out + h * layout_.padded();
    for (int64_t d = 0; d < head_dim; ++d) out[d] = sums[d] / work.state[h].sum;
    if (config_.kv_type == KvType::kInt4) kv_rotate(out, head_dim);
  }
}

void TileAttention::attend_view(const BatchRows& rows, const View& seen, const Rows& at, const Work& work) const {
  reset(work);
  for (int64_t segment = seen.first / kKvSegment; segment < seen.segments_end(); ++segment) {
    attend_segment(seen, segment, work, work.segments, work.sums);
    merge(work.segments, work.sums, work);
  }
  attend_tail(rows, seen, at, work);
  finish(seen, at, work);
}

void TileAttention::attend(const BatchRows& rows, int64_t layer, const float* q, float* out, int64_t stride) {
  constexpr int64_t kPieceBytes = 64 << 10;
  const Rows at{q, out, stride};
  const int64_t longest = *std::max_element(rows.positions, rows.positions + rows.n_rows) + 1;
  if (rows.n_rows == 1 && longest > kKvSegment && pool_.size() > 1) return attend_split(rows, layer, at);
  // Short texts are not worth a second core's attention. Rows that follow each other share what they read.
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, longest * layout_.bytes() / 8));
  pool_.parallel(rows.n_rows * config_.n_kv_heads, grain, [&](int64_t begin, int64_t end, int thread) {
    const Work work = work_of(thread);
    for (int64_t item = begin; item < end; ++item) {
      View seen = view(rows, layer, item % rows.n_rows, item / rows.n_rows);
      copy_staged(rows, staged_of(thread), &seen);
      attend_view(rows, seen, at, work);
    }
  });
}

void TileAttention::attend_split(const BatchRows& rows, int64_t layer, const Rows& at) {
  const View any = view(rows, layer, 0, 0);
  const int64_t first = any.first / kKvSegment, n = any.segments_end() - first;
  const int64_t padded = layout_.padded();
  const auto part = [&](int64_t item) { return item * group_; };
  pool_.parallel(config_.n_kv_heads * n, 1, [&](int64_t begin, int64_t end, int thread) {
    const Work work = work_of(thread);
    for (int64_t item = begin; item < end; ++item) {
      attend_segment(view(rows, layer, 0, item / n), first + item % n, work, found_ + part(item),
                     found_sums_ + part(item) * padded);
    }
  });
  pool_.parallel(config_.n_kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    const Work work = work_of(thread);
    for (int64_t head = begin; head < end; ++head) {
      reset(work);
      for (int64_t item = head * n; item < (head + 1) * n; ++item) {
        merge(found_ + part(item), found_sums_ + part(item) * padded, work);
      }
      const View seen = view(rows, layer, 0, head);
      attend_tail(rows, seen, at, work);
      finish(seen, at, work);
    }
  });
}

}  // namespace edge
