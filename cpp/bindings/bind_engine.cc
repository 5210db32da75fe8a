// The engine's coarse calls. Each releases the GIL; signals are looked at once per layer.
#include <optional>

#include <pybind11/numpy.h>

#include "bindings/binding.h"
#include "bindings/kv_options.h"
#include "bindings/config_from_dict.h"
#include "bindings/run.h"
#include "engine/engine.h"
#include "engine/sequence.h"

namespace py = pybind11;

namespace edge {
namespace {

EngineOptions options_from(const py::dict& dict) {
  EngineOptions options;
  options.pack_path = dict["pack_path"].cast<std::string>();
  options.decoder = decoder_config_from(dict["decoder"]);
  for (uint8_t placement : dict["placement"].cast<std::vector<uint8_t>>()) {
    options.plan.placement.push_back(static_cast<Placement>(placement));
  }
  options.plan.stream_order = dict["stream_order"].cast<std::vector<WeightId>>();
  options.plan.ring_bytes = dict["ring_bytes"].cast<uint64_t>();
  options.plan.demand_bytes = dict["demand_bytes"].cast<uint64_t>();
  if (dict.contains("neuron_slots")) {
    options.plan.neuron_slots = dict["neuron_slots"].cast<std::vector<int64_t>>();
    options.plan.neuron_staging_bytes = dict["neuron_staging_bytes"].cast<uint64_t>();
    options.plan.neuron_bytes = dict["neuron_bytes"].cast<uint64_t>();
  }
  if (dict.contains("neuron_half_life_tokens")) {
    options.store.neuron_half_life_tokens = dict["neuron_half_life_tokens"].cast<float>();
  }
  if (dict.contains("neuron_keep")) options.neuron_keep = dict["neuron_keep"].cast<float>();
  if (dict.contains("neuron_free_reads")) options.neuron_free_reads = dict["neuron_free_reads"].cast<int64_t>();
  if (dict.contains("expert_guess_layers")) options.store.expert_guess_layers = dict["expert_guess_layers"].cast<int>();
  options.store.fill_experts = !dict.contains("fill_experts") || dict["fill_experts"].cast<bool>();
  options.store.io_engine = dict["io_engine"].cast<std::string>();
  options.n_threads = dict["threads"].cast<int>();
  options.isa = dict["isa"].cast<std::string>();
  options.context = dict["context"].cast<int64_t>();
  options.max_rows = dict["max_rows"].cast<int64_t>();
  options.budget_bytes = dict["budget_bytes"].cast<uint64_t>();
  kv_options_from(dict, &options);
  return options;
}

Status as_status(Status status) { return status; }

bool signal_pending() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

std::unique_ptr<Engine> open(const py::dict& dict, LoadProgress* progress, Engine* partner) {
  EngineOptions options = options_from(dict);
  options.store.progress = progress;
  auto engine = value(run([&] { return Engine::open(options, partner); }));
  engine->interrupted = signal_pending;
  return engine;
}

py::dict stats(Engine& engine) {
  const StoreStats store = engine.store().stats();
  py::dict dict;
  dict["flash_bytes"] = store.flash_bytes;
  dict["load_bytes"] = store.load_bytes;
  dict["resident_bytes"] = store.resident_bytes;
  dict["staging_bytes"] = store.staging_bytes;
  dict["hits"] = store.hits;
  dict["misses"] = store.misses;
  dict["pass_expert_bytes"] = store.pass_expert_bytes;
  dict["wait_seconds"] = store.wait_seconds;
  dict["experts_guessed"] = store.experts_guessed;
  dict["experts_guessed_right"] = store.experts_guessed_right;
  dict["neurons_wanted"] = store.neurons_wanted;
  dict["neuron_hits"] = store.neuron_hits;
  dict["neuron_misses"] = store.neurons_wanted - store.neuron_hits;
  dict["neuron_bytes"] = store.neuron_bytes;
  dict["neurons_passed_over"] = store.neurons_passed_over;
  dict["neuron_requests"] = store.neuron_requests;
  dict["neurons_expected"] = store.neurons_expected;
  dict["neuron_expected_hits"] = store.neuron_expected_hits;
  dict["neuron_wait_seconds"] = store.neuron_wait_seconds;
  dict["budget_bytes"] = engine.budget().limit_bytes();
  dict["used_bytes"] = engine.budget().used_bytes();
  dict["peak_bytes"] = engine.budget().peak_bytes();
  dict["by_tag"] = engine.budget().report();
  add_kv_stats(engine, dict);
  dict["isa"] = engine.kernels().isa;
  return dict;
}

py::array_t<float> to_array(const std::vector<float>& values) {
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

// A writable C-ordered array [n_layers][max_rows][width] of items T, or none.
template <typename T>
std::span<T> room(const py::object& array, const char* name) {
  if (array.is_none()) return {};
  const py::buffer_info info = array.cast<py::buffer>().request(/*writable=*/true);
  bool packed = info.ndim == 3 && info.itemsize == static_cast<py::ssize_t>(sizeof(T));
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t i = info.ndim; packed && i-- > 0; stride *= info.shape[static_cast<size_t>(i)]) {
    packed = info.strides[static_cast<size_t>(i)] == stride;
  }
  if (!packed) {
    check(error(Code::kBadArgument, "capture: %s: expected a C-ordered array of 3 dimensions of %zu-byte items, found another",
                name, sizeof(T)));
  }
  return {static_cast<T*>(info.ptr), static_cast<size_t>(info.size)};
}

void set_thresholds(Engine& engine, const std::optional<py::array_t<float, py::array::c_style>>& thresholds) {
  std::span<const float> values;
  if (thresholds) values = {thresholds->data(), static_cast<size_t>(thresholds->size())};
  check(engine.decoder().set_neuron_thresholds(values, engine.budget()));
}

void bind(py::module_& module) {
  py::class_<Engine>(module, "Engine", "A loaded model inside its budget.")
      .def(py::init(&open), py::arg("options"), py::arg("progress").none(true) = nullptr,
           py::arg("partner").none(true) = nullptr, "partner: an engine that never computes at the same time; its "
           "threads serve this one too.")
      .def("cancel", &Engine::cancel, py::call_guard<py::gil_scoped_release>())
      .def("resume", &Engine::resume, py::call_guard<py::gil_scoped_release>())
      .def("resize",
           [](Engine& self, const py::dict& dict, LoadProgress* progress) {
             EngineOptions options = options_from(dict);
             options.store.progress = progress;
             check(run([&] { return self.resize(options); }));
           },
           py::arg("options"), py::arg("progress").none(true) = nullptr,
           "Another budget and the plan made for it, between passes. After an error the old one is in place.")
      .def("stats", &stats)
      .def_property_readonly("context", [](Engine& self) { return self.options().context; })
      .def_property_readonly("vocab_size", [](Engine& self) { return self.decoder().config().vocab_size; })
      .def_property_readonly("kv_page_tokens", [](Engine& self) { return self.kv_pool().page_tokens(); })
      .def_property_readonly("kv_pages_left", [](Engine& self) { return self.kv_pool().n_pages_left(); },
                             "Pages of keys and values that no sequence has.")
      .def("set_neuron_thresholds", &set_thresholds, py::arg("thresholds").none(true),
           "[n_layers, intermediate]: neurons with |act(gate)| at or below their threshold count as zero. None ends it. "
           "Keys and values computed before stay as they are.");

  py::class_<Sequence>(module, "Sequence", "One text in the making.")
      .def(py::init([](Engine& engine) { return value(Sequence::create(engine)); }), py::keep_alive<1, 2>())
      .def("set_tokens",
           [](Sequence& self, std::vector<int32_t> tokens) { return value(self.set_tokens(std::move(tokens))); })
      .def_property_readonly("tokens", &Sequence::tokens)
      .def_property_readonly("n_tokens", [](const Sequence& self) { return self.tokens().size(); })
      .def_property_readonly("n_pending", &Sequence::n_pending)
      .def("advance", [](Sequence& self) { check(run([&] { return as_status(self.advance()); })); })
      .def(
          "capture",
          [](Sequence& self, const py::object& inputs, const py::object& gates, const py::object& open,
             const py::object& norms) {
            const FfnCapture into{room<uint16_t>(inputs, "inputs"), room<uint16_t>(gates, "gates"),
                                  room<float>(norms, "norms"), room<uint8_t>(open, "open")};
            return value(run([&] { return self.capture(into); }));
          },
          py::arg("inputs") = py::none(), py::arg("gates") = py::none(), py::arg("open") = py::none(),
          py::arg("norms") = py::none(),
          "advance(), and what each feed-forward layer saw, into float16 inputs [layers, max_rows, hidden], float16 gates "
          "(before the activation) [layers, max_rows, neurons] and uint8 open (bits of gates above zero, lowest first) "
          "[layers, max_rows, ceil(neurons / 8)] and the length of the residual stream, float32 norms [layers, max_rows, 1]; "
          "returns the rows written.")
      .def("next",
           [](Sequence& self, Sampler& sampler) {
             const SampledToken token = value(run([&] { return self.next(sampler); }));
             return py::make_tuple(token.token, token.logprob, token.top);
           })
      .def("logits", [](Sequence& self) { return to_array(value(run([&] { return self.logits(); }))); })
      .def("score",
           [](Sequence& self, std::vector<int32_t> tokens) {
             return value(run([&] { return self.score(std::move(tokens)); }));
           })
      .def("keep_hidden", &Sequence::keep_hidden)
      .def("hidden",
           [](const Sequence& self) { return to_array({self.hidden().begin(), self.hidden().end()}); },
           "Final-normed state [hidden_size] that the newest token was drawn from, after keep_hidden().")
      .def(
          "fork",
          [](Sequence& self, int64_t n_tokens) {
            py::object text = py::cast(value(self.fork(n_tokens)));
            // The engine must stay; the text it begins like must not, or its pages would.
            py::detail::keep_alive_impl(text, py::cast(&self.engine(), py::return_value_policy::reference));
            return text;
          },
          py::arg("n_tokens"),
          "Another text that begins as the first n_tokens of this one and shares their keys and values.")
      .def("truncate", [](Sequence& self, int64_t n_tokens) { check(self.truncate(n_tokens)); })
      .def("shift", [](Sequence& self, int64_t keep_first, int64_t keep_last) {
        check(self.shift(keep_first, keep_last));
      });

  module.def(
      "step",
      [](Engine& engine, const std::vector<std::tuple<Sequence*, Sampler*, int64_t>>& given, double ms,
         const std::vector<int32_t>& ends) {
        std::vector<Sequence::Lane> lanes;
        for (const auto& [text, sampler, max_tokens] : given) lanes.push_back({text, sampler, max_tokens});
        const auto drawn = value(run([&] { return Sequence::run(engine, lanes, ms, ends); }));
        py::list out;
        for (const auto& tokens : drawn) {
          py::list of_one;
          for (const SampledToken& token : tokens) of_one.append(py::make_tuple(token.token, token.logprob, token.top));
          out.append(std::move(of_one));
        }
        return out;
      },
      py::arg("engine"), py::arg("lanes"), py::arg("ms") = 0.0, py::arg("ends") = std::vector<int32_t>(),
      "Passes over pending tokens of several (Sequence, Sampler, tokens it may get), until ms have passed: the drawn (token, "
      "logprob, top) of each. A text gets nothing while more of it is pending, and no more behind one of `ends`.");
  module.def(
      "fixed_bytes",
      [](const py::dict& decoder, int64_t context, int64_t max_rows, int n_threads) {
        const DecoderConfig config = decoder_config_from(decoder);
        check(config.validate());
        const FixedBytes fixed = fixed_bytes(config, context, max_rows, n_threads);
        return py::make_tuple(fixed.kv, fixed.activations, fixed.logits);
      },
      "Bytes the core takes besides weights: (kv cache, activations, logits per sequence).");
}

const Binding binding("engine", bind);

}  // namespace
}  // namespace edge
