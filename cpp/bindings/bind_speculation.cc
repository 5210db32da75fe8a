// Speculation: the drafters of an engine behind one step() that gives one token or several.
#include "bindings/binding.h"
#include "bindings/run.h"
#include "engine/speculator.h"
#include "speculate/lookahead_drafter.h"
#include "speculate/lookup_drafter.h"
#include "speculate/rejection.h"

namespace py = pybind11;

namespace edge {
namespace {

// Guesses from Python: propose(text, max_nodes) gives (token, parent) pairs, parent 0 being the root. Those of "draft"
// take time: it is asked for a chain as deep as pays. Those of "callback", for tests, are taken to cost nothing.
class CallbackDrafter final : public Drafter {
 public:
  CallbackDrafter(py::object propose, bool is_draft) : propose_(std::move(propose)), is_draft_(is_draft) {}
  ~CallbackDrafter() override {
    py::gil_scoped_acquire gil;
    propose_ = py::object();
  }

  const char* name() const override { return is_draft_ ? "draft" : "callback"; }
  void restart() override {}
  Status propose(const DraftContext& context, DraftTree& tree) override {
    py::gil_scoped_acquire gil;
    const int64_t most = tree.limits().max_nodes;
    const int64_t deepest = std::min(context.depth, tree.limits().max_depth);
    try {
      const std::vector<int32_t> text(context.text.begin(), context.text.end());
      const auto nodes = propose_(text, is_draft_ ? std::min(most, deepest + 1) : most).cast<std::vector<std::pair<int64_t, int64_t>>>();
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
  bool is_free() const override { return !is_draft_; }

 private:
  py::object propose_;
  bool is_draft_;
};

AcceptRule rule_of(const std::string& name) {
  if (name == "coupling") return AcceptRule::kCoupling;
  if (name == "rejection") return AcceptRule::kRejection;
  if (name == "typical") return AcceptRule::kTypical;
  raise(error(Code::kBadArgument, "acceptance: expected coupling, rejection or typical, found %s", name.c_str()));
}

using Pairs = std::vector<std::pair<int32_t, double>>;

std::vector<TokenProbability> probabilities(const Pairs& pairs) {
  std::vector<TokenProbability> all;
  for (const auto& [token, probability] : pairs) all.push_back({token, probability});
  return all;
}

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

int64_t chain_verified(Controller& controller, const std::vector<int32_t>& guesses, const std::vector<int32_t>& text) {
  DraftTree tree;
  const int64_t n = static_cast<int64_t>(guesses.size());
  tree.reset(0, {n + 1, n, INT32_MAX});
  int32_t parent = 0;
  for (int32_t guess : guesses) parent = tree.add(parent, guess, 0);
  const DraftTree proposed = tree;
  controller.prune(tree);
  controller.learn(proposed, text);
  return tree.size() - 1;
}

constexpr int64_t kMostAutomatonTokens = 1 << 20;

// With memory of its own, for tests.
struct LoneAutomaton {
  explicit LoneAutomaton(int64_t max_tokens)
      : budget(SuffixAutomaton::bytes(max_tokens) + (64 << 10)),
        automaton(max_tokens, value(budget.reserve(SuffixAutomaton::bytes(max_tokens), "automaton"))) {}

  py::list contexts() const {
    py::list all;
    for (int32_t state = automaton.longest(); state > 0; state = automaton.shorter(state)) {
      std::vector<std::pair<int32_t, int64_t>> next;
      automaton.continuations(state, [&](int32_t token, int64_t end) {
        next.emplace_back(token, end);
        return true;
      });
      all.append(py::make_tuple(automaton.length(state), next));
    }
    return all;
  }

  Budget budget;
  SuffixAutomaton automaton;
};

const Binding kBinding("speculation", [](py::module_& module) {
  py::class_<Speculator>(module, "Speculator", "Drafters, verification and their controller for one engine.")
      .def(py::init<Engine&>(), py::arg("engine"), py::keep_alive<1, 2>())
      .def("configure",
           [](Speculator& self, int64_t depth, int64_t max_rows, const std::string& acceptance,
              std::vector<std::string> drafters, std::vector<std::string> always) {
             SpeculationOptions options;
             options.acceptance = rule_of(acceptance);
             options.depth = depth;
             options.max_rows = max_rows;
             options.drafters = std::move(drafters);
             options.always = std::move(always);
             self.configure(std::move(options));
           },
           py::arg("depth") = 0, py::arg("max_rows") = 33, py::arg("acceptance") = "coupling",
           py::arg("drafters") = std::vector<std::string>(), py::arg("always") = std::vector<std::string>(),
           "For the steps to come. No drafters named: all of them.")
      .def("add_lookup",
           [](Speculator& self, int64_t window_tokens) {
             self.add(value(LookupDrafter::create(window_tokens, self.budget())));
           })
      .def("add_draft",
           [](Speculator& self, Engine& draft, bool is_copy) { check(self.add_draft(draft, is_copy)); },
           py::arg("draft"), py::arg("is_copy") = false, py::keep_alive<1, 2>())
      .def("add_medusa", [](Speculator& self) { check(run([&] { return self.add_medusa(); })); })
      .def("add_lookahead",
           [](Speculator& self, int64_t window, int64_t n, int64_t n_grams) {
             if (window < 1 || window > 32 || n < 2 || n > 8 || n_grams < 1 || n_grams > 32) {
               raise(error(Code::kBadArgument, "lookahead: expected a window of 1..32, n of 2..8 and 1..32 n-grams, found "
                           "%lld, %lld and %lld", static_cast<long long>(window), static_cast<long long>(n),
                           static_cast<long long>(n_grams)));
             }
             self.add(std::make_unique<LookaheadDrafter>(window, n, n_grams));
           })
      .def("add_callback",
           [](Speculator& self, py::object propose, const std::string& name) {
             if (name != "callback" && name != "draft") {
               raise(error(Code::kBadArgument, "add_callback: expected callback or draft, found %s", name.c_str()));
             }
             self.add(std::make_unique<CallbackDrafter>(std::move(propose), name == "draft"));
           },
           py::arg("propose"), py::arg("name") = "callback")
      .def("measure", [](Speculator& self) { check(run([&] { return self.measure(); })); },
           "Times passes and guesses in a few milliseconds.")
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
      .def("proposed",
           [](const Speculator& self) {
             std::vector<std::pair<int32_t, int32_t>> nodes;
             for (int32_t node = 1; node < self.proposed().size(); ++node) {
               nodes.emplace_back(self.proposed().tokens()[node], self.proposed().parents()[node]);
             }
             return nodes;
           },
           "(token, parent) of every guess of the last step; parent 0 is the token before them.")
      .def("stats", &stats);
  py::class_<Controller>(module, "SpeculationController", "Decides what is worth verifying; for tests, which plant costs.")
      .def(py::init<>())
      .def("record", [](Controller& self, int64_t rows, double ms) { self.cost.record(rows, ms); })
      .def("cost", [](const Controller& self, int64_t rows) { return self.cost(rows); })
      .def("set_prior", [](Controller& self, double rate) { self.acceptance.set_prior(0, rate); })
      .def("chain",
           [](const Controller& self, const std::vector<double>& rates, double ms_fixed, double ms_per_depth) {
             const Controller::Chain chain = self.chain(rates, ms_fixed, ms_per_depth);
             return std::pair(chain.depth, chain.rate);
           },
           py::arg("rates"), py::arg("ms_fixed") = 0.0, py::arg("ms_per_depth") = 0.0)
      .def("verifies", &chain_verified, py::arg("guesses"), py::arg("text"),
           "How many of a chain of guesses are verified; then it learns which of them the text bears out.")
      .def("account", [](Controller& self, int64_t n_tokens, double ms, double usual_ms) {
             self.account(n_tokens, ms, likely_ms(ms, usual_ms));
           }, py::arg("n_tokens"), py::arg("ms"), py::arg("usual_ms") = 0.0)
      .def("note", &Controller::note)
      .def("least_reach", &Controller::least_reach, py::arg("n_guesses"), py::arg("draft_ms"), py::arg("rate"))
      .def("begin_text", &Controller::begin_text)
      .def("may_spend", &Controller::may_spend, py::arg("ms") = 0.0);
  py::class_<LoneAutomaton>(module, "SuffixAutomaton", "What followed the end of a text where it occurred before.")
      .def(py::init([](int64_t max_tokens) {
             if (max_tokens < 1 || max_tokens > kMostAutomatonTokens) {
               raise(error(Code::kBadArgument, "suffix automaton: expected room for 1..%lld tokens, found %lld",
                           static_cast<long long>(kMostAutomatonTokens), static_cast<long long>(max_tokens)));
             }
             return std::make_unique<LoneAutomaton>(max_tokens);
           }),
           py::arg("max_tokens"))
      .def("append",
           [](LoneAutomaton& self, int32_t token) {
             if (self.automaton.full()) raise(error(Code::kBadArgument, "suffix automaton: it is full"));
             self.automaton.append(token);
           })
      .def("contexts", &LoneAutomaton::contexts,
           "(length, [(token, where it stood last)]) of the ends of the text that occurred before, longest first.");
  module.def(
      "draw_without_replacement",
      [](const Pairs& q, size_t n, uint64_t seed, uint64_t position) {
        return draw_without_replacement(probabilities(q), n, seed, position);
      },
      "Tokens drawn one after the other from q [(id, probability)].");
  module.def(
      "draw_by_rejection",
      [](const Pairs& p, const Pairs& q, const std::vector<int32_t>& drawn, const std::vector<int32_t>& guesses,
         uint64_t seed, uint64_t position) {
        std::vector<TokenProbability> work = probabilities(p);
        return draw_by_rejection(work, probabilities(q), drawn, guesses, seed, position);
      },
      "The next token under p [(id, probability), by ascending id], given children drawn from q and other guesses.");
});

}  // namespace
}  // namespace edge
