// Test access to the key-value cache: token trees through a model, and sequences of a pool without one.
#include <pybind11/numpy.h>

#include <algorithm>
#include <numeric>

#include "bindings/binding.h"
#include "engine/engine.h"

namespace py = pybind11;

namespace edge {
namespace {

using Rows = std::vector<std::vector<float>>;

Result<Rows> forward(Engine& engine, KvCache& kv, const std::vector<int32_t>& tokens,
                     const std::vector<int32_t>& parents) {
  EDGE_TRY(engine.decoder().forward({tokens, parents}, kv));
  std::vector<int32_t> rows(tokens.size());
  std::iota(rows.begin(), rows.end(), 0);
  Rows logits;
  EDGE_TRY(engine.decoder().logits(rows, [&](size_t, std::span<float> row) -> Status {
    logits.emplace_back(row.begin(), row.end());
    return {};
  }));
  return logits;
}

// Every step is a forward pass over (tokens, parents), then commits the rows of `path` (None: rolls back).
std::vector<Rows> run_trees(Engine& engine, const py::list& steps) {
  KvCache kv(engine.kv_pool());
  std::vector<Rows> out;
  for (const auto& item : steps) {
    const auto step = item.cast<py::tuple>();
    out.push_back(value(forward(engine, kv, step[0].cast<std::vector<int32_t>>(), step[1].cast<std::vector<int32_t>>())));
    if (step[2].is_none()) kv.rollback();
    else kv.commit(step[2].cast<std::vector<int32_t>>());
  }
  return out;
}

// A pool and its sequences, whose rows are numbers: every value of a row is the same f16 pattern.
class PoolTest {
 public:
  PoolTest(int64_t n_layers, int64_t kv_dim, int64_t context, int64_t resident_pages, int64_t range_pages,
           const std::string& folder, const std::string& read_fault, const std::string& write_fault)
      : budget_(uint64_t{1} << 30), threads_(1), n_layers_(n_layers), kv_dim_(kv_dim) {
    KvOptions& options = options_;
    options.resident_pages = resident_pages;
    options.range_pages = range_pages;
    options.scratch.folder = folder;
    options.scratch.reader.fault = read_fault;
    options.scratch.write_fault = write_fault;
    pool_ = value(KvPool::create(KvPool::flash_shape(n_layers, kv_dim), context, options, budget_));
  }
  ~PoolTest() { caches_.clear(); }

  int add() {
    caches_.push_back(std::make_unique<KvCache>(*pool_));
    return static_cast<int>(caches_.size()) - 1;
  }
  void remove(int cache) { caches_[static_cast<size_t>(cache)].reset(); }
  // Stages one row per number.
  void stage(int cache, const std::vector<uint16_t>& numbers) {
    KvCache& kv = at(cache);
    check(kv.stage(static_cast<int64_t>(numbers.size())));
    const KvShape& shape = pool_->shape();
    for (size_t i = 0; i < numbers.size(); ++i) {
      for (int64_t layer = 0; layer < shape.n_layers; ++layer) {
        const int64_t slot = kv.n_committed() + static_cast<int64_t>(i);
        std::fill_n(kv.key(layer, slot), shape.kv_dim, numbers[i] + static_cast<uint16_t>(layer));
        std::fill_n(kv.value(layer, slot), shape.kv_dim, ~(numbers[i] + static_cast<uint16_t>(layer)));
      }
    }
  }
  // To `resident_pages` in memory, or (0) to all of them.
  void move(int64_t resident_pages, int64_t range_pages, const std::string& read_fault, const std::string& write_fault) {
    KvOptions options = options_;
    options.resident_pages = resident_pages;
    options.range_pages = range_pages;
    options.scratch.reader.fault = read_fault;
    options.scratch.write_fault = write_fault;
    KvShape shape = KvPool::flash_shape(n_layers_, kv_dim_);
    edge::check(pool_->park(shape, options, budget_));
    parked_bytes_ = budget_.used_bytes();
    if (resident_pages == 0) shape = {.n_layers = n_layers_, .kv_dim = kv_dim_};
    edge::check(pool_->settle(shape, options, budget_));
  }
  uint64_t parked_bytes() const { return parked_bytes_; }
  int64_t n_committed(int cache) { return at(cache).n_committed(); }
  // The numbers of the committed rows, all of which are in memory.
  std::vector<uint16_t> rows(int cache) {
    KvCache& kv = at(cache);
    std::vector<uint16_t> numbers;
    for (int64_t slot = 0; slot < kv.n_committed(); ++slot) {
      bool same = true;
      const uint16_t number = *kv.key(0, slot);
      for (int64_t layer = 0; layer < n_layers_; ++layer) {
        const auto expected = static_cast<uint16_t>(number + layer);
        const auto is = [&](const uint16_t* row, uint16_t value) {
          return std::all_of(row, row + kv_dim_, [&](uint16_t v) { return v == value; });
        };
        same = same && is(kv.key(layer, slot), expected) && is(kv.value(layer, slot), static_cast<uint16_t>(~expected));
      }
      numbers.push_back(same ? number : 0xffff);
    }
    return numbers;
  }
  void commit(int cache, const std::vector<int32_t>& path) { at(cache).commit(path); }
  void rollback(int cache) { at(cache).rollback(); }
  void truncate(int cache, int64_t n_tokens) { at(cache).truncate(n_tokens); }
  // The numbers a pass sees, per (layer, repeat, half), each from its layer's first slot on.
  std::vector<std::vector<uint16_t>> read(int cache, const std::vector<int64_t>& first_slots, int64_t repeats) {
    KvCache& kv = at(cache);
    const KvShape& shape = pool_->shape();
    KvStream& stream = *pool_->stream();
    stream.start(kv.pages(), kv.n_committed(), first_slots, repeats);
    std::vector<std::vector<uint16_t>> out;
    for (int64_t layer = 0; layer < shape.n_layers; ++layer) {
      for (int64_t i = 0; i < 2 * repeats; ++i) {
        std::vector<uint16_t> numbers;
        for (int64_t slot = first_slots[static_cast<size_t>(layer)]; slot < kv.n_committed();) {
          const Result<KvRange> range = stream.next(threads_);
          if (!range.ok()) {
            kv.rollback();
            raise(range.status());
          }
          const int64_t first_page = range->begin / shape.page_tokens;
          for (slot = range->begin; slot < range->end; ++slot) {
            const int64_t page = slot / shape.page_tokens;
            const uint16_t* rows =
                range->data != nullptr
                    ? reinterpret_cast<const uint16_t*>(range->data + static_cast<uint64_t>(page - first_page) * shape.half_bytes())
                    : pool_->rows(kv.pages()[static_cast<size_t>(page)].frame, layer, range->half);
            const uint16_t* row = rows + slot % shape.page_tokens * shape.kv_dim;
            const uint16_t number = range->half == kKeys ? *row : static_cast<uint16_t>(~*row);
            numbers.push_back(std::all_of(row, row + shape.kv_dim, [&](uint16_t v) { return v == *row; }) && range->layer == layer
                                  ? static_cast<uint16_t>(number - layer) : 0xffff);
          }
        }
        out.push_back(std::move(numbers));
      }
    }
    stream.stop();
    return out;
  }
  // (pages in memory, pages in the file) of one sequence.
  std::pair<int64_t, int64_t> pages(int cache) {
    std::pair<int64_t, int64_t> n = {0, 0};
    for (const KvPage& page : at(cache).pages()) {
      n.first += page.frame >= 0;
      n.second += page.place >= 0;
    }
    return n;
  }
  uint64_t bytes_written() const { return pool_->flash()->bytes_written(); }
  uint64_t used_bytes() const { return budget_.used_bytes(); }

 private:
  KvCache& at(int cache) { return *caches_[static_cast<size_t>(cache)]; }

  Budget budget_;
  ThreadPool threads_;
  int64_t n_layers_, kv_dim_;
  KvOptions options_;
  uint64_t parked_bytes_ = 0;
  std::unique_ptr<KvPool> pool_;
  std::vector<std::unique_ptr<KvCache>> caches_;
};

void bind(py::module_& module) {
  module.def("kv_trees", &run_trees, "Forward passes over (tokens, parents, committed path or None) of a new sequence.");
  py::class_<PoolTest>(module, "KvPoolTest")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&, const std::string&,
                    const std::string&>(),
           py::arg("n_layers"), py::arg("kv_dim"), py::arg("context"), py::arg("resident_pages"),
           py::arg("range_pages"), py::arg("folder"), py::arg("read_fault") = "", py::arg("write_fault") = "")
      .def("add", &PoolTest::add)
      .def("remove", &PoolTest::remove)
      .def("stage", &PoolTest::stage)
      .def("move", &PoolTest::move, py::arg("resident_pages"), py::arg("range_pages"), py::arg("read_fault") = "",
           py::arg("write_fault") = "")
      .def("rows", &PoolTest::rows)
      .def("n_committed", &PoolTest::n_committed)
      .def_property_readonly("parked_bytes", &PoolTest::parked_bytes)
      .def("commit", &PoolTest::commit)
      .def("rollback", &PoolTest::rollback)
      .def("truncate", &PoolTest::truncate)
      .def("read", &PoolTest::read)
      .def("pages", &PoolTest::pages)
      .def_property_readonly("bytes_written", &PoolTest::bytes_written)
      .def_property_readonly("used_bytes", &PoolTest::used_bytes);
}

const Binding kv_test_binding("kv_test", bind);

}  // namespace
}  // namespace edge
