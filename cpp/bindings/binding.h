// Each bind_<topic>.cc registers itself; module.cc runs them all. A Status becomes the typed exception of flashload.errors.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/status.h"

namespace edge {

struct Binding {
  using Fn = void (*)(pybind11::module_&);
  Binding(const char* name, Fn fn);
  const char* name;
  Fn fn;
  Binding* next;
};

[[noreturn]] void raise(const Status& status);

inline void check(const Status& status) {
  if (!status.ok()) raise(status);
}

template <typename T>
T value(Result<T> result) {
  if (!result.ok()) raise(result.status());
  return result.take();
}

// [{"name", "available", "reason"}] of anything that has these.
template <typename T>
pybind11::list availability(const std::vector<T>& items) {
  pybind11::list list;
  for (const T& item : items) {
    pybind11::dict dict;
    dict["name"] = item.name;
    dict["available"] = item.available;
    dict["reason"] = item.reason;
    list.append(dict);
  }
  return list;
}

}  // namespace edge
