// Speculation: the drafters of an engine behind one step() that gives one token or several.
#include "bindings/binding.h"
#include "bindings/run.h"
#include "engine/speculator.h"
#include "speculate/lookup_drafter.h"

namespace py = pybind11;

namespace edge {
namespace {

// Guesses from Python, for tests: propose(text, max_nodes) gives (token, parent) pairs, parent 0 being the root.
class CallbackDrafter final : public Drafter {
 public:
  explicit CallbackDrafter(py::object propose) : propose_(std::move(propose)) {}
  ~CallbackDrafter() override {
    py::gil_scoped_acquire gil;
    propose_ = py::object();
  }

  const char* name() const override { return "callback"; }
  void restart() override {}
  Status propose(const DraftContext& context, DraftTree& tree) override {
    py::gil_scoped_acquire gil;
    try {
      const std::vector<int32_t> text(context.text.begin(), context.text.end());
      const auto nodes = propose_(text, tree.limits().max_nodes).cast<std::vector<std::pair<int64_t, int64_t>>>();
      std::vector<int32_t> made{0};  // what became of the root and of each pair
      for (const auto& [token, parent] : nodes) {
        const int32_t below = parent >= 0 && parent < static_cast<int64_t>(made.size()) ? made[parent] : -1;
        made.push_back(tree.add(below, static_cast<int32_t>(std::clamp<int64_t>(token, -1, INT32_MAX)), first_source()));
      }
    } catch (py::error_already_set& raised) {
      raised.restore();
      return error(Code::kBadArgument, "drafter: raised an exception");
    } catch (const py::cast_error&) {
      return error(Code::kBadArgument, "drafter: expected a list of (token, parent) pairs");
    }
    return {};
  }
  bool is_free() const override { return true; }

 private:
  py::object propose_;
};

py::dict stats(const Speculator& speculator) {
  const SpeculationStats found = speculator.stats();
  py::dict drafters;
  for (const DrafterStats& drafter : found.drafters) {
    py::dict one;
    one["tried"] = drafter.tried;
    one["accepted"] = drafter.accepted;
    one["ms"] = drafter.ms;
    drafters[drafter.name.c_str()] = one;
  }
  py::dict dict;
  dict["drafters"] = drafters;
  dict["passes"] = found.passes;
  dict["tokens"] = found.tokens;
  dict["plain_passes"] = found.plain_passes;
  dict["saved_ms"] = found.saved_ms;
  dict["pass_ms"] = found.pass_ms;
  return dict;
}

const Binding kBinding("speculation", [](py::module_& module) {
  py::class_<Speculator>(module, "Speculator", "Drafters, verification and their controller for one engine.")
      .def(py::init([](Engine& engine, int64_t depth, int64_t max_rows) {
             SpeculationOptions options;
             options.depth = depth;
             options.max_rows = max_rows;
             return std::make_unique<Speculator>(engine, options);
           }),
           py::arg("engine"), py::arg("depth") = 0, py::arg("max_rows") = 17, py::keep_alive<1, 2>())
      .def("add_lookup",
           [](Speculator& self, int64_t window_tokens) {
             self.add(value(LookupDrafter::create(window_tokens, self.budget())));
           })
      .def("add_callback",
           [](Speculator& self, py::object propose) {
             self.add(std::make_unique<CallbackDrafter>(std::move(propose)));
           })
      .def("step",
           [](Speculator& self, Sequence& sequence, Sampler& sampler, int64_t max_tokens,
              const std::vector<int32_t>& stop_tokens) {
             const auto tokens = value(run([&] { return self.step(sequence, sampler, {max_tokens, stop_tokens}); }));
             py::list list;
             for (const SampledToken& token : tokens) {
               list.append(py::make_tuple(token.token, token.logprob, token.top));
             }
             return list;
           })
      .def("stats", &stats);
});

}  // namespace
}  // namespace edge
