// Test and benchmark access to the float operators of any ISA: _edge.op(isa, name, ...).
#include <pybind11/numpy.h>

#include "bindings/binding.h"
#include "kernels/kernels.h"

namespace py = pybind11;

namespace edge {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<uint16_t, py::array::c_style>;

// Positional arguments after the ISA and the name, each with a check that names what was found.
class Arguments {
 public:
  Arguments(std::string name, py::args args) : name_(std::move(name)), args_(std::move(args)) {}

  void expect(size_t n, const char* signature) const {
    if (args_.size() == n) return;
    raise(error(Code::kBadArgument, "op %s: expected arguments (%s), found %zu", name_.c_str(), signature,
                args_.size()));
  }
  // n < 0 takes any size.
  Floats floats(size_t i, int64_t n = -1) const {
    Floats array = args_[i].cast<Floats>();
    if (n >= 0 && array.size() != n) wrong_size(i, n, array.size());
    return array;
  }
  // None gives an empty array, whose data is then passed as null.
  Floats optional_floats(size_t i, int64_t n) const { return args_[i].is_none() ? Floats(0) : floats(i, n); }
  Halves matrix(size_t i, int64_t rows, int64_t columns) const {
    Halves array = args_[i].cast<Halves>();
    const int64_t size = rows < 0 ? array.size() / columns * columns : rows * columns;
    if (array.ndim() != 2 || array.size() != size || array.shape(1) != columns) wrong_size(i, size, array.size());
    return array;
  }
  float number(size_t i) const { return args_[i].cast<float>(); }
  // Ascending, each in [least, most].
  std::vector<int64_t> integers(size_t i, int64_t least, int64_t most) const {
    const auto values = args_[i].cast<std::vector<int64_t>>();
    for (const int64_t value : values) {
      if (value < least || value > most) wrong_size(i, most, value);
      least = value;
    }
    return values;
  }

 private:
  [[noreturn]] void wrong_size(size_t i, int64_t expected, int64_t found) const {
    raise(error(Code::kBadArgument, "op %s, argument %zu: expected %lld values, found %lld", name_.c_str(), i,
                static_cast<long long>(expected), static_cast<long long>(found)));
  }
  std::string name_;
  py::args args_;
};

Floats copy(const Floats& x) { return Floats({x.size()}, x.data()); }

const float* data_or_null(const Floats& x) { return x.size() == 0 ? nullptr : x.data(); }

// With `steps`, a fifth argument: the first keys of the ranges scores and values are computed over.
py::object attention(const Kernels& kernels, const Arguments& args, bool steps) {
  args.expect(steps ? 5 : 4, "q [group, head_dim], k f16 bits [keys, head_dim], v f16 bits, scale");
  const Floats q = args.floats(0);
  if (q.ndim() != 2 || q.shape(1) == 0) raise(error(Code::kBadArgument, "op attention: q must be [group, head_dim]"));
  const int64_t head_dim = q.shape(1);
  const Halves k = args.matrix(1, -1, head_dim);
  const Halves v = args.matrix(2, k.shape(0), head_dim);
  std::vector<const uint16_t*> k_rows, v_rows;
  for (int64_t i = 0; i < k.shape(0); ++i) {
    k_rows.push_back(k.data() + i * head_dim);
    v_rows.push_back(v.data() + i * head_dim);
  }
  std::vector<float> scores(static_cast<size_t>(q.shape(0) * k.shape(0)));
  Floats out({q.shape(0), q.shape(1)});
  AttentionArgs a{q.data(), q.shape(0), head_dim, k_rows.data(), v_rows.data(), k.shape(0), args.number(3),
                  scores.data(), out.mutable_data(), k.shape(0)};
  std::vector<int64_t> ranges;
  if (steps) ranges = args.integers(4, 0, a.n_visible);
  ranges.push_back(a.n_visible);
  const auto over_ranges = [&](void (*step)(const AttentionArgs&)) {
    a.first = 0;
    for (const int64_t end : ranges) {
      a.k = k_rows.data() + a.first;
      a.v = v_rows.data() + a.first;
      a.n = end - a.first;
      step(a);
      a.first = end;
    }
  };
  kernels.attention_begin(a);
  over_ranges(kernels.attention_scores);
  kernels.attention_weigh(a);
  over_ranges(kernels.attention_values);
  return out;
}

using GatedFn = void (*)(const float*, const float*, int64_t, float*);

GatedFn gated(const Kernels& kernels, const std::string& name) {
  if (name == "silu_mul") return kernels.silu_mul;
  if (name == "relu_mul") return kernels.relu_mul;
  if (name == "gelu_mul") return kernels.gelu_mul;
  if (name == "gelu_tanh_mul") return kernels.gelu_tanh_mul;
  return nullptr;
}

py::object op(const std::string& isa, const std::string& name, py::args positional) {
  const Kernels& kernels = *value(kernels_for(isa));
  const Arguments args(name, std::move(positional));
  if (const GatedFn fn = gated(kernels, name)) {
    args.expect(2, "gate, up or None");
    const Floats gate = args.floats(0);
    const Floats up = args.optional_floats(1, gate.size());
    Floats out(gate.size());
    fn(gate.data(), data_or_null(up), gate.size(), out.mutable_data());
    return out;
  }
  if (name == "attention" || name == "attention_steps") return attention(kernels, args, name == "attention_steps");
  // The rest run in place on a copy of x, as the model does.
  if (name == "rms_norm") {
    args.expect(3, "x, weight, eps");
    Floats x = copy(args.floats(0));
    const Floats weight = args.floats(1, x.size());
    kernels.rms_norm(x.data(), weight.data(), args.number(2), x.size(), x.mutable_data());
    return x;
  }
  if (name == "layer_norm") {
    args.expect(4, "x, weight, bias or None, eps");
    Floats x = copy(args.floats(0));
    const Floats weight = args.floats(1, x.size());
    const Floats bias = args.optional_floats(2, x.size());
    kernels.layer_norm(x.data(), weight.data(), data_or_null(bias), args.number(3), x.size(), x.mutable_data());
    return x;
  }
  if (name == "rope") {
    args.expect(3, "x, cos [n_rotary / 2], sin [n_rotary / 2]");
    Floats x = copy(args.floats(0));
    const Floats cos = args.floats(1);
    const Floats sin = args.floats(2, cos.size());
    if (cos.size() * 2 > x.size()) {
      raise(error(Code::kBadArgument, "op rope: expected at most %zd cosines, found %zd", x.size() / 2, cos.size()));
    }
    kernels.rope(x.mutable_data(), cos.data(), sin.data(), cos.size() * 2);
    return x;
  }
  if (name == "add" || name == "scale_add") {
    const bool scaled = name == "scale_add";
    args.expect(scaled ? 3 : 2, scaled ? "into, x, scale" : "into, x");
    Floats into = copy(args.floats(0));
    const Floats x = args.floats(1, into.size());
    if (scaled) {
      kernels.scale_add(x.data(), args.number(2), x.size(), into.mutable_data());
    } else {
      kernels.add(x.data(), x.size(), into.mutable_data());
    }
    return into;
  }
  if (name == "beyond") {
    args.expect(2, "x, limit or None");
    const Floats x = args.floats(0);
    const Floats limit = args.optional_floats(1, x.size());
    py::array_t<uint64_t> out((x.size() + 63) / 64);
    kernels.beyond(x.data(), data_or_null(limit), x.size(), out.mutable_data());
    return out;
  }
  if (name == "softmax") {
    args.expect(1, "x");
    Floats x = copy(args.floats(0));
    kernels.softmax(x.mutable_data(), x.size());
    return x;
  }
  if (name == "to_f16") {
    args.expect(1, "x");
    const Floats x = args.floats(0);
    Halves out(x.size());
    kernels.to_f16(x.data(), x.size(), out.mutable_data());
    return out;
  }
  raise(error(Code::kBadArgument,
              "unknown op '%s': expected one of rms_norm, layer_norm, rope, silu_mul, relu_mul, gelu_mul, "
              "gelu_tanh_mul, add, scale_add, beyond, softmax, attention, attention_steps, to_f16",
              name.c_str()));
}

const Binding kBinding("ops", [](py::module_& module) {
  module.def("op", op, py::arg("isa"), py::arg("name"),
             "Runs one float operator of one ISA on arrays: op(isa, name, *arguments); for tests and benchmarks.");
});

}  // namespace
}  // namespace edge
