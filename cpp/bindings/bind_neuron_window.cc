// A test hook for the neuron window, without a model around it.
#include "bindings/binding.h"
#include "core/budget.h"
#include "store/neuron_window.h"

namespace py = pybind11;

namespace edge {
namespace {

class NeuronWindowTest {
 public:
  NeuronWindowTest(const std::string& path, const std::vector<int64_t>& slots, uint64_t staging_bytes,
                   uint64_t budget_bytes, const StoreOptions& options)
      : directory_(value(PackDirectory::open(path))), budget_(budget_bytes) {
    StorePlan plan;
    plan.neuron_slots = slots;
    for (size_t i = 0; i < slots.size() && i < directory_.entries().size(); ++i) {
      const bool here = is_neuron_format(directory_.entries()[i].format) && slots[i] >= 0;
      plan.placement.push_back(here ? Placement::kNeurons : Placement::kUnused);
    }
    plan.neuron_staging_bytes = staging_bytes;
    plan.neuron_bytes = NeuronWindow::plan_bytes(directory_, plan);
    py::gil_scoped_release release;
    Result<std::unique_ptr<NeuronWindow>> window = NeuronWindow::open(path, directory_, plan, options, budget_);
    const Status status = window.ok() ? (*window)->load(nullptr) : window.status();
    py::gil_scoped_acquire gil;
    check(status);
    window_ = window.take();
  }

  // One turn: the records in order, and where each group ended.
  py::tuple read(WeightId weight, const std::vector<int32_t>& neurons, std::vector<uint64_t> rows, int64_t most_groups,
                 WeightId next, const std::vector<int32_t>& expected) {
    if (rows.empty()) rows.assign(neurons.size(), 1);
    std::vector<const std::byte*> found(neurons.size());
    check(window_->want(weight, neurons, rows, found.data()));
    if (next != kNoWeight && window_->expects(next)) {
      check(window_->expect(next, expected));
      check(window_->read_on());
    }
    const uint64_t record_bytes = directory_.entry(weight).chunk_bytes;
    py::list records, ends;
    for (size_t done = 0; done < neurons.size() && most_groups != 0; --most_groups) {
      const size_t end = value(window_->take());
      for (; done < end; ++done) records.append(py::bytes(reinterpret_cast<const char*>(found[done]), record_bytes));
      ends.append(end);
    }
    return py::make_tuple(records, ends);
  }

  std::vector<bool> held(WeightId weight, const std::vector<int32_t>& neurons) {
    std::vector<const std::byte*> found(neurons.size());
    const std::vector<uint64_t> rows(neurons.size(), 1);
    check(window_->want(weight, neurons, rows, found.data()));
    window_->rollback();
    std::vector<bool> out;
    for (const std::byte* record : found) out.push_back(record != nullptr);
    return out;
  }

  void pass_over(WeightId weight, int32_t neuron, uint64_t rows) { window_->pass_over(weight, neuron, rows); }
  void commit(const std::vector<int32_t>& path) { window_->commit(path); }
  void rollback() { window_->rollback(); }
  py::dict stats() const {
    StoreStats stats;
    window_->add_stats(&stats);
    py::dict dict;
    dict["wanted"] = stats.neurons_wanted;
    dict["hits"] = stats.neuron_hits;
    dict["bytes"] = stats.neuron_bytes;
    dict["passed_over"] = stats.neurons_passed_over;
    dict["requests"] = stats.neuron_requests;
    dict["expected"] = stats.neurons_expected;
    dict["expected_hits"] = stats.neuron_expected_hits;
    dict["wait_seconds"] = stats.neuron_wait_seconds;
    dict["resident_bytes"] = stats.resident_bytes;
    dict["staging_bytes"] = stats.staging_bytes;
    return dict;
  }
  std::map<std::string, uint64_t> memory() const { return budget_.report(); }

 private:
  PackDirectory directory_;
  Budget budget_;
  std::unique_ptr<NeuronWindow> window_;
};

void bind(py::module_& module) {
  py::class_<NeuronWindowTest>(module, "NeuronWindowTest")
      .def(py::init([](const std::string& path, const std::vector<int64_t>& slots, uint64_t staging_bytes,
                       uint64_t budget, const std::string& engine, bool direct, int depth, const std::string& fault,
                       float half_life_tokens) {
             StoreOptions options;
             options.io_engine = engine;
             options.io_direct = direct;
             options.io_depth = depth;
             options.io_fault = fault;
             options.neuron_half_life_tokens = half_life_tokens;
             return std::make_unique<NeuronWindowTest>(path, slots, staging_bytes, budget, options);
           }),
           py::arg("path"), py::arg("slots"), py::arg("staging_bytes") = 1 << 20,
           py::arg("budget") = uint64_t{1} << 30, py::arg("engine") = "auto", py::arg("direct") = true,
           py::arg("depth") = 0, py::arg("fault") = "",
           py::arg("half_life_tokens") = NeuronPolicy::kHalfLifeTokens,
           "slots: per weight of the directory, -1 where it is not one of the window's.")
      .def("read", &NeuronWindowTest::read, py::arg("weight"), py::arg("neurons"),
           py::arg("rows") = std::vector<uint64_t>(), py::arg("most_groups") = -1, py::arg("next") = kNoWeight,
           py::arg("expected") = std::vector<int32_t>(),
           "(records, ends of the groups they came in) of ascending neurons; `expected` are of the weight read next.")
      .def("held", &NeuronWindowTest::held, py::arg("weight"), py::arg("neurons"), "Which have a slot; changes nothing.")
      .def("pass_over", &NeuronWindowTest::pass_over, py::arg("weight"), py::arg("neuron"), py::arg("rows") = 1)
      .def("commit", &NeuronWindowTest::commit, py::arg("path"))
      .def("rollback", &NeuronWindowTest::rollback)
      .def("stats", &NeuronWindowTest::stats)
      .def("memory", &NeuronWindowTest::memory, "Budgeted bytes per tag.");
}

const Binding binding("neuron_window", bind);

}  // namespace
}  // namespace edge
