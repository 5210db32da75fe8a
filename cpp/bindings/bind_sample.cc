// The sampler and its random numbers, as one class and a few functions for tests and scoring.
#include <pybind11/numpy.h>

#include <memory>

#include "bindings/binding.h"
#include "sample/philox.h"
#include "sample/sampler.h"

namespace py = pybind11;

namespace edge {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <typename T>
T convert(const std::string& name, const py::handle& found, const char* expected) {
  try {
    return py::cast<T>(found);
  } catch (const py::cast_error&) {
    raise(error(Code::kBadArgument, "%s: expected %s, found %s", name.c_str(), expected,
                std::string(py::repr(found)).c_str()));
  }
}

// Keys are the members of SamplingConfig; logit_bias is a dict or a list of pairs. A key left out keeps its default.
SamplingConfig config_from(const py::dict& dict) {
  SamplingConfig config;
  const std::pair<const char*, float*> numbers[] = {
      {"temperature", &config.temperature},
      {"typical_p", &config.typical_p},
      {"top_p", &config.top_p},
      {"min_p", &config.min_p},
      {"repetition_penalty", &config.repetition_penalty},
      {"presence_penalty", &config.presence_penalty},
      {"frequency_penalty", &config.frequency_penalty},
  };
  const std::pair<const char*, int64_t*> integers[] = {
      {"top_k", &config.top_k}, {"penalty_last_n", &config.penalty_last_n}, {"n_logprobs", &config.n_logprobs}};
  for (const auto& [key, found] : dict) {
    const std::string name = py::str(key);
    bool known = true;
    if (name == "seed") {
      config.seed = convert<uint64_t>(name, found, "an integer in [0, 2^64)");
    } else if (name == "logit_bias") {
      const py::object pairs = py::isinstance<py::dict>(found) ? py::object(py::list(found.attr("items")()))
                                                               : py::reinterpret_borrow<py::object>(found);
      config.logit_bias = convert<decltype(config.logit_bias)>(name, pairs, "pairs of token id and number");
    } else {
      known = false;
      for (const auto& [number, target] : numbers) {
        if (name == number) *target = convert<float>(name, found, "a number"), known = true;
      }
      for (const auto& [integer, target] : integers) {
        if (name == integer) *target = convert<int64_t>(name, found, "an integer"), known = true;
      }
    }
    if (!known) raise(error(Code::kBadArgument, "unknown sampling setting '%s'", name.c_str()));
  }
  return config;
}

std::unique_ptr<Sampler> make_sampler(const py::dict& dict, int64_t vocab_size) {
  SamplingConfig config = config_from(dict);
  check(config.validate(vocab_size));
  return std::make_unique<Sampler>(std::move(config), vocab_size);
}

py::tuple sample(Sampler& sampler, const Floats& logits, const std::vector<int32_t>& history, uint64_t position) {
  std::vector<float> work(logits.data(), logits.data() + logits.size());
  Result<SampledToken> token = Status();
  {
    py::gil_scoped_release release;
    token = sampler.sample(work, history, position);
  }
  SampledToken drawn = value(std::move(token));
  return py::make_tuple(drawn.token, drawn.logprob, drawn.top);
}

std::vector<std::pair<int32_t, double>> distribution(Sampler& sampler, const Floats& logits,
                                                    const std::vector<int32_t>& history, uint64_t position) {
  std::vector<float> work(logits.data(), logits.data() + logits.size());
  std::vector<std::pair<int32_t, double>> pairs;
  for (const TokenProbability& one : value(sampler.distribution(work, history, position))) {
    pairs.emplace_back(one.token, one.probability);
  }
  return pairs;
}

const Binding kBinding("sample", [](py::module_& module) {
  py::class_<Sampler>(module, "Sampler", "Draws tokens: Sampler(config, vocab_size).")
      .def(py::init(&make_sampler), py::arg("config"), py::arg("vocab_size"))
      .def("sample", &sample, py::arg("logits"), py::arg("history"), py::arg("position"),
           "(token, logprob, [(id, logprob), ...]) for logits [vocab_size]; history and position as in a text.")
      .def("distribution", &distribution, py::arg("logits"), py::arg("history"), py::arg("position"),
           "[(id, probability), ...] that sample() draws from, by ascending id.");
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Philox4x32-10 of four and two words.");
  module.def("philox", [](uint64_t seed, uint64_t position, int32_t id) { return philox(seed, position, id); },
             py::arg("seed"), py::arg("position"), py::arg("id"), "The four random words of one token at one position.");
  module.def("gumbel", &gumbel, py::arg("seed"), py::arg("position"), py::arg("id"),
             "The standard Gumbel variate of one token at one position.");
  module.def(
      "log_prob",
      [](const Floats& logits, int32_t id) {
        return log_prob({logits.data(), static_cast<size_t>(logits.size())}, id);
      },
      py::arg("logits"), py::arg("id"), "Natural log of softmax(logits)[id]; nan where it is not defined.");
  module.def(
      "rough_share",
      [](const Floats& logits, size_t id) {
        if (id >= static_cast<size_t>(logits.size())) throw py::index_error("rough_share: the id lies outside the logits");
        return rough_share({logits.data(), static_cast<size_t>(logits.size())}, static_cast<int32_t>(id));
      },
      py::arg("logits"), py::arg("id"), "softmax(logits)[id] within 4 %: what drafts are judged by.");
});

}  // namespace
}  // namespace edge
