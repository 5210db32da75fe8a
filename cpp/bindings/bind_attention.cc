// Test and benchmark access to attention over keys and values of every type.
#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "bindings/binding.h"
#include "engine/sequence.h"
#include "kernels/gemv_table.h"
#include "kernels/registry.h"
#include "model/row_attention.h"
#include "model/tile_attention.h"

namespace py = pybind11;

namespace edge {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Clock = std::chrono::steady_clock;

constexpr int64_t kReadPieceBytes = 64 << 10;

KvType type_of(const std::string& name) {
  if (name == "f16") return KvType::kF16;
  if (name == "int8") return KvType::kInt8;
  if (name == "int4") return KvType::kInt4;
  raise(error(Code::kBadArgument, "kv_type: expected f16, int8 or int4, found %s", name.c_str()));
}

struct Tiles {
  KvTileLayout layout;
  std::vector<std::byte> keys, values;
  std::vector<const std::byte*> key_tiles, value_tiles;
};

Tiles tiles_of(const std::string& type, const Floats& k, const Floats& v) {
  if (k.ndim() != 2 || v.ndim() != 2 || k.shape(0) != v.shape(0) || k.shape(1) != v.shape(1)) {
    raise(error(Code::kBadArgument, "keys and values: expected two float arrays [n, head_dim]"));
  }
  Tiles made;
  made.layout = {type_of(type), k.shape(1)};
  const int64_t n_tiles = (k.shape(0) + kKvTileTokens - 1) / kKvTileTokens;
  for (auto* bytes : {&made.keys, &made.values}) bytes->resize(static_cast<size_t>(n_tiles * made.layout.bytes()));
  for (int64_t i = 0; i < n_tiles; ++i) {
    made.key_tiles.push_back(made.keys.data() + i * made.layout.bytes());
    made.value_tiles.push_back(made.values.data() + i * made.layout.bytes());
  }
  for (int64_t i = 0; i < k.shape(0); ++i) {
    const int64_t at = i / kKvTileTokens * made.layout.bytes();
    kv_store(made.layout, k.data(i, 0), v.data(i, 0), i % kKvTileTokens, made.keys.data() + at, made.values.data() + at);
  }
  return made;
}

py::tuple kv_round(const std::string& type, const Floats& k, const Floats& v) {
  const Tiles tiles = tiles_of(type, k, v);
  Floats keys({k.shape(0), k.shape(1)}), values({k.shape(0), k.shape(1)});
  for (int64_t i = 0; i < k.shape(0); ++i) {
    const auto tile = static_cast<size_t>(i / kKvTileTokens);
    kv_load(tiles.layout, tiles.key_tiles[tile], tiles.value_tiles[tile], i % kKvTileTokens, keys.mutable_data(i, 0),
            values.mutable_data(i, 0));
  }
  return py::make_tuple(keys, values);
}

Floats kv_rotate_rows(const Floats& x) {
  Floats out({x.shape(0), x.shape(1)}, x.data());
  for (int64_t i = 0; i < x.shape(0); ++i) kv_rotate(out.mutable_data(i, 0), x.shape(1));
  return out;
}

// Of every segment of the keys from `first` on, in order; no rotation.
Floats tile_attention(const std::string& isa, const std::string& type, const Floats& q, const Floats& k, const Floats& v,
                      float scale, int64_t first) {
  const Kernels& kernels = *value(kernels_for(isa));
  const Tiles tiles = tiles_of(type, k, v);
  const TileKernels& steps = kernels.tiles.of(tiles.layout.type);
  const int64_t group = q.shape(0), head_dim = tiles.layout.head_dim, padded = tiles.layout.padded(), n = k.shape(0);
  if (q.ndim() != 2 || q.shape(1) != head_dim || first < 0 || first >= n) {
    raise(error(Code::kBadArgument, "q: expected [group, %lld], and a first key of %lld", static_cast<long long>(head_dim),
                static_cast<long long>(n)));
  }
  std::vector<int8_t> queries(static_cast<size_t>(group * padded));
  std::vector<float> q_scales(static_cast<size_t>(group)), scores(static_cast<size_t>(group * kKvSegment)),
      value_scales(kKvSegment), out(static_cast<size_t>(group * padded));
  std::vector<int32_t> q_sums(static_cast<size_t>(group)), sums(static_cast<size_t>(group * padded));
  std::vector<AttentionState> states(static_cast<size_t>(group));
  for (int64_t h = 0; h < group; ++h) {
    kv_round_query(q.data(h, 0), head_dim, queries.data() + h * padded, &q_scales[static_cast<size_t>(h)],
                   &q_sums[static_cast<size_t>(h)]);
    q_scales[static_cast<size_t>(h)] *= scale;
  }
  for (int64_t begin = first / kKvSegment * kKvSegment; begin < n; begin += kKvSegment) {
    TileArgs a;
    a.q = queries.data();
    a.q_scales = q_scales.data();
    a.q_sums = q_sums.data();
    a.group = group;
    a.layout = tiles.layout;
    const int64_t from = std::max(begin, first / kKvTileTokens * kKvTileTokens);
    a.first = first - from;
    a.end = std::min(n, begin + kKvSegment) - from;
    a.n_tiles = (a.end + kKvTileTokens - 1) / kKvTileTokens;
    a.tiles = tiles.key_tiles.data() + from / kKvTileTokens;
    a.scores = scores.data();
    a.value_scales = value_scales.data();
    a.stride = kKvSegment;
    steps.scores(a);
    std::vector<SegmentSum> found;
    for (int64_t h = 0; h < group; ++h) {
      found.push_back(steps.weigh(scores.data() + h * kKvSegment, a.n_tiles * kKvTileTokens, value_scales.data()));
    }
    std::fill(sums.begin(), sums.end(), 0);
    a.tiles = tiles.value_tiles.data() + from / kKvTileTokens;
    a.weights = reinterpret_cast<const int16_t*>(scores.data());
    a.weight_stride = 2 * kKvSegment;
    a.sums = sums.data();
    steps.values(a);
    for (int64_t h = 0; h < group; ++h) {
      steps.merge(found[static_cast<size_t>(h)], sums.data() + h * padded, padded, &states[static_cast<size_t>(h)],
                  out.data() + h * padded);
    }
  }
  Floats result({group, head_dim});
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t d = 0; d < head_dim; ++d) {
      *result.mutable_data(h, d) = out[static_cast<size_t>(h * padded + d)] / states[static_cast<size_t>(h)].sum;
    }
  }
  return result;
}

// Ordinary random rows behind what is committed.
Status fill(KvCache& kv, int64_t n_tokens, const Kernels& kernels, uint64_t seed) {
  constexpr int64_t kRows = 16;
  const KvShape& shape = kv.pool().shape();
  std::vector<float> row(static_cast<size_t>(2 * shape.kv_dim));
  uint64_t state = seed * 2 + 1;
  for (int64_t done = 0; done < n_tokens; done += kRows) {
    const int64_t n = std::min(kRows, n_tokens - done);
    EDGE_TRY(kv.stage(n));
    for (int64_t slot = kv.n_committed(); slot < kv.n_committed() + n; ++slot) {
      for (int64_t layer = 0; layer < shape.n_layers; ++layer) {
        for (float& x : row) {
          state = state * 6364136223846793005u + 1442695040888963407u;
          x = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-30f;
        }
        const float *key = row.data(), *value = key + shape.kv_dim;
        if (shape.type == KvType::kF16) {
          kernels.to_f16(key, shape.kv_dim, kv.key(layer, slot));
          kernels.to_f16(value, shape.kv_dim, kv.value(layer, slot));
          continue;
        }
        const KvTileLayout tile = shape.tile();
        for (int64_t head = 0; head < shape.n_tiles(); ++head) {
          kv_store(tile, key + head * tile.head_dim, value + head * tile.head_dim, slot % kKvTileTokens,
                   kv.group(layer, kKeys, slot) + head * tile.bytes(), kv.group(layer, kValues, slot) + head * tile.bytes());
        }
      }
    }
    kv.commit_all();
  }
  return {};
}

void fill_kv(Sequence& sequence, int64_t n_tokens, uint64_t seed) {
  check(fill(sequence.kv(), n_tokens, *value(default_kernels()), seed));
}

// One row's attention over one layer after the other, as a decoder computes it.
class AttentionBench {
 public:
  AttentionBench(const std::string& isa, const std::string& type, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                 int64_t n_tokens, int64_t least_bytes, int n_threads)
      : kernels_(*value(kernels_for(isa))), table_(*value(gemv_table_for(isa))), budget_(uint64_t{1} << 40), pool_(n_threads) {
    config_.n_heads = n_heads;
    config_.n_kv_heads = n_kv_heads;
    config_.head_dim = head_dim;
    config_.kv_type = type_of(type);
    config_.attention_scale = 0.125f;
    KvShape shape;
    shape.type = config_.kv_type;
    shape.head_dim = head_dim;
    shape.kv_dim = config_.kv_dim();
    shape.n_layers = 1;
    const int64_t context = n_tokens + 64;
    const auto layer_bytes = static_cast<int64_t>(shape.page_bytes()) * shape.pages_for(n_tokens);
    shape.n_layers = config_.n_layers = std::max<int64_t>(1, least_bytes / layer_bytes);
    config_.windows.assign(static_cast<size_t>(config_.n_layers), 0);
    bytes_ = layer_bytes * config_.n_layers;
    KvOptions options;
    options.n_tails = 3;
    kv_pool_ = value(KvPool::create(shape, context, options, budget_));
    kv_ = std::make_unique<KvCache>(*kv_pool_);
    check(fill(*kv_, n_tokens - 1, kernels_, 1));
    check(kv_->stage(1));
    home_ = {kv_.get(), 0};
    position_ = n_tokens - 1;
    q_.resize(static_cast<size_t>(config_.q_dim()), 0.5f);
    out_.resize(q_.size());
    row_.resize(static_cast<size_t>(2 * config_.kv_dim()), 0.25f);
    if (config_.kv_type != KvType::kF16) {
      tiles_ = value(TileAttention::create(config_, {1, context, 0}, kernels_, pool_, budget_));
    } else {
      by_row_ = value(RowAttention::create(config_, context, kernels_, pool_, budget_));
    }
  }

  py::dict measure(double seconds) {
    std::vector<double> took, read;
    {
      const py::gil_scoped_release unlocked;
      pass();
      const auto end = Clock::now() + std::chrono::duration<double>(seconds);
      do {
        read.push_back(timed([&] { read_all(); }));
        took.push_back(timed([&] { pass(); }));
      } while (Clock::now() < end);
    }
    py::dict found;
    found["bytes"] = bytes_;
    found["layers"] = config_.n_layers;
    found["seconds"] = took;
    found["read_seconds"] = read;
    return found;
  }

 private:
  template <typename Fn>
  static double timed(Fn&& fn) {
    const auto start = Clock::now();
    fn();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  // The same pages, one after the other.
  void read_all() {
    std::atomic<uint64_t> sink = 0;
    const int64_t piece = std::min<int64_t>(kReadPieceBytes, bytes_ / config_.n_layers / 1024 * 1024);
    const std::byte* const data = kv_pool_->half(kv_->pages().front().frame, 0, kKeys);
    pool_.parallel(bytes_ / piece, 1, [&](int64_t begin, int64_t end, int) {
      sink += table_.read_bytes(data + begin * piece, (end - begin) * piece);
    });
  }

  void pass() {
    const uint64_t sees_itself = 1;
    const BatchRows rows{1, &home_, &position_, &sees_itself, 1};
    for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
      if (tiles_ == nullptr) {
        by_row_->attend(rows, layer, q_.data(), out_.data(), config_.q_dim());
        continue;
      }
      std::vector<float> q = q_, row = row_;
      tiles_->put(rows, layer, 0, q.data(), row.data(), row.data() + config_.kv_dim());
      tiles_->attend(rows, layer, q.data(), out_.data(), config_.q_dim());
    }
  }

  const Kernels& kernels_;
  const GemvTable& table_;
  Budget budget_;
  ThreadPool pool_;
  DecoderConfig config_;
  int64_t bytes_ = 0;
  std::unique_ptr<KvPool> kv_pool_;
  std::unique_ptr<KvCache> kv_;
  RowHome home_;
  int64_t position_ = 0;
  std::vector<float> q_, out_, row_;
  std::unique_ptr<TileAttention> tiles_;
  std::unique_ptr<RowAttention> by_row_;
};

void bind(py::module_& module) {
  module.def("kv_round", &kv_round, py::arg("kv_type"), py::arg("keys"), py::arg("values"),
             "What keys and values [n, head_dim] are worth once rounded to int8 or int4.");
  module.def("kv_rotate", &kv_rotate_rows, "Rows rotated as queries, keys and values of int4 are.");
  module.def("tile_attention", &tile_attention, py::arg("isa"), py::arg("kv_type"), py::arg("q"), py::arg("keys"),
             py::arg("values"), py::arg("scale"), py::arg("first") = 0,
             "Attention of queries [group, head_dim] over keys from `first` on, rounded to int8 or int4.");
  module.def("fill_kv", &fill_kv, py::arg("sequence"), py::arg("n_tokens"), py::arg("seed") = 1,
             "Random keys and values as if n_tokens more of the sequence's tokens had been computed.");
  py::class_<AttentionBench>(module, "AttentionBench")
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int>(),
           py::arg("isa"), py::arg("kv_type"), py::arg("n_heads"), py::arg("n_kv_heads"), py::arg("head_dim"),
           py::arg("n_tokens"), py::arg("least_bytes"), py::arg("threads"))
      .def("measure", &AttentionBench::measure, py::arg("seconds"),
           "Passes of attention over all layers, in turn with plain reads of their keys and values.");
}

const Binding attention_binding("attention", bind);

}  // namespace
}  // namespace edge
