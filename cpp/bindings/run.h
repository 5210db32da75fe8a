// Long calls into the core run without the GIL.
#pragma once

#include <pybind11/pybind11.h>

namespace edge {

// Runs fn without the GIL; an exception raised in Python meanwhile (Ctrl-C, a callback) wins over fn's own error.
template <typename Fn>
auto run(Fn&& fn) {
  pybind11::gil_scoped_release release;
  auto result = fn();
  if (!result.ok()) {
    pybind11::gil_scoped_acquire gil;
    if (PyErr_Occurred()) throw pybind11::error_already_set();
  }
  return result;
}

}  // namespace edge
