// The same with keys and values that arrive in ranges: all keys pass by, then all values, in the steps of one segment
// after the other.
#include <algorithm>

#include "model/tile_attention.h"

namespace edge {

Status TileAttention::attend_streamed(const BatchRows& rows, int64_t layer, const float* q, float* out, int64_t stride) {
  const Rows at{q, out, stride};
  for (int64_t row = 0; row < rows.n_rows; row += options_.score_rows) {
    EDGE_TRY(stream_block(rows, layer, row, std::min(rows.n_rows, row + options_.score_rows), at));
  }
  return {};
}

Status TileAttention::stream_block(const BatchRows& rows, int64_t layer, int64_t row_begin, int64_t row_end,
                                   const Rows& at) {
  KvCache& kv = *rows.homes[row_begin].kv;
  const KvShape& shape = kv.pool().shape();
  const int64_t n_whole = whole_tokens(kv.n_committed()), padded = layout_.padded();
  // fn(view, work, position of the first score, room for copies)
  const auto for_views = [&](auto&& fn) {
    pool_.parallel((row_end - row_begin) * config_.n_kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t item = begin; item < end; ++item) {
        View seen = view(rows, layer, row_begin + item / config_.n_kv_heads, item % config_.n_kv_heads);
        fn(seen, work_of(item), seen.first / kKvSegment * kKvSegment, staged_of(thread));
      }
    });
  };
  // fn(first, end) for the parts of [begin, end) that lie in one segment each.
  const auto for_segments = [](int64_t begin, int64_t end, auto&& fn) {
    for (int64_t next; begin < end; begin = next) {
      next = std::min(end, (begin / kKvSegment + 1) * kKvSegment);
      fn(begin, next);
    }
  };
  using Tile = const std::byte* (*)(const void* context, const View& view, int64_t position);
  const auto score = [&](const View& seen, const Work& work, int64_t origin, int64_t begin, int64_t end, Tile of,
                         const void* context) {
    begin = std::max(begin, seen.first / kKvTileTokens * kKvTileTokens);
    for_segments(begin, std::min(end, seen.end), [&](int64_t from, int64_t to) {
      TileArgs a = args(seen, work);
      a.n_tiles = (to - from + kKvTileTokens - 1) / kKvTileTokens;
      for (int64_t i = 0; i < a.n_tiles; ++i) work.tiles[i] = of(context, seen, from + i * kKvTileTokens);
      a.first = seen.first - from;
      a.end = to - from;
      a.scores = work.scores + from - origin;
      a.value_scales = work.value_scales + from - origin;
      steps_.scores(a);
    });
  };
  const auto add_values = [&](const View& seen, const Work& work, int64_t origin, int64_t begin, int64_t end, Tile of,
                              const void* context) {
    begin = std::max(begin, seen.first / kKvTileTokens * kKvTileTokens);
    for_segments(begin, std::min(end, seen.end), [&](int64_t from, int64_t to) {
      const int64_t segment = from / kKvSegment * kKvSegment - origin;
      const int64_t segment_begin = std::max(segment + origin, seen.first / kKvTileTokens * kKvTileTokens);
      if (from == segment_begin) std::fill_n(work.sums, group_ * padded, 0);
      TileArgs a = args(seen, work);
      a.n_tiles = (to - from + kKvTileTokens - 1) / kKvTileTokens;
      for (int64_t i = 0; i < a.n_tiles; ++i) work.tiles[i] = of(context, seen, from + i * kKvTileTokens);
      // Weights lie together from where the segment's scores began.
      a.weights = reinterpret_cast<const int16_t*>(work.scores + segment_begin - origin) + (from - segment_begin);
      a.weight_stride = 2 * work.stride;
      a.sums = work.sums;
      steps_.values(a);
      if (to < std::min(seen.end, segment + origin + kKvSegment)) return;
      merge(work.segments + segment / kKvSegment * group_, work.sums, work);
    });
  };
  const auto stream = [&](auto&& step) -> Status {
    for (int64_t slot = config_.first_visible(layer, kv.n_committed()); slot < n_whole;) {
      EDGE_ASSIGN(const KvRange range, kv.pool().stream()->next(pool_));
      struct Source {
        const TileAttention* self;
        const KvRange* range;
        const KvShape* shape;
      } const source{this, &range, &shape};
      const Tile of = [](const void* context, const View& seen, int64_t position) {
        const auto& from = *static_cast<const Source*>(context);
        if (from.range->data == nullptr) return from.self->tile(seen, from.range->half, position);
        const int64_t page_tokens = from.shape->page_tokens;
        const int64_t page = position / page_tokens - from.range->begin / page_tokens;
        return from.range->data + static_cast<uint64_t>(page) * from.shape->half_bytes() +
               static_cast<uint64_t>(position % page_tokens / kKvTileTokens) * from.shape->group_bytes() +
               seen.head * from.self->layout_.bytes();
      };
      for_views([&](const View& seen, const Work& work, int64_t origin, std::byte*) {
        step(seen, work, origin, range.begin / kKvTileTokens * kKvTileTokens, range.end, of, &source);
      });
      slot = range.end;
    }
    return {};
  };
  // Tiles that hold staged rows are in memory.
  struct InMemory {
    const TileAttention* self;
    KvHalf half;
  };
  const Tile staged = [](const void* context, const View& seen, int64_t position) {
    const auto& from = *static_cast<const InMemory*>(context);
    return from.self->tile(seen, from.half, position);
  };
  const InMemory keys{this, kKeys}, values{this, kValues};

  for_views([&](View& seen, const Work& work, int64_t origin, std::byte* copies) {
    copy_staged(rows, copies, &seen);
    reset(work);
    score(seen, work, origin, n_whole, seen.end, staged, &keys);
  });
  EDGE_TRY(stream(score));
  for_views([&](const View& seen, const Work& work, int64_t origin, std::byte*) {
    for_segments(seen.first / kKvTileTokens * kKvTileTokens, seen.end, [&](int64_t from, int64_t to) {
      const int64_t n = (to - from + kKvTileTokens - 1) / kKvTileTokens * kKvTileTokens;
      for (int64_t h = 0; h < group_; ++h) {
        work.segments[(from - origin) / kKvSegment * group_ + h] =
            steps_.weigh(work.scores + h * work.stride + from - origin, n, work.value_scales + from - origin);
      }
    });
  });
  EDGE_TRY(stream(add_values));
  for_views([&](View& seen, const Work& work, int64_t origin, std::byte* copies) {
    copy_staged(rows, copies, &seen);
    add_values(seen, work, origin, n_whole, seen.end, staged, &values);
    attend_tail(rows, seen, at, work);
    finish(seen, at, work);
  });
  return {};
}

}  // namespace edge
