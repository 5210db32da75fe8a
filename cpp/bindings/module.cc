#include "bindings/binding.h"

namespace py = pybind11;

namespace edge {
namespace {
Binding*& first_binding() {
  static Binding* first = nullptr;
  return first;
}
}  // namespace

Binding::Binding(const char* name, Fn fn) : name(name), fn(fn), next(first_binding()) { first_binding() = this; }

void raise(const Status& status) {
  py::gil_scoped_acquire gil;
  const py::dict by_code = py::module_::import("flashload.errors").attr("BY_CODE");
  const py::object type = by_code[code_name(status.code())];
  PyErr_SetString(type.ptr(), status.message().c_str());
  throw py::error_already_set();
}

}  // namespace edge

PYBIND11_MODULE(_edge, module) {
  module.doc() = "The compiled core of edge.";
  for (edge::Binding* binding = edge::first_binding(); binding != nullptr; binding = binding->next) binding->fn(module);
}
