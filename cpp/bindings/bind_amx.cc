// Test access to AMX: one product of tiles, by the hardware or by its model, and the check that lets AMX be chosen.
#if defined(__x86_64__)

#include <pybind11/numpy.h>

#include <cstring>

#include "bindings/binding.h"
#include "kernels/amx_model.h"
#include "kernels/gemv_check.h"
#include "kernels/kernels.h"
#include "kernels/registry.h"

namespace py = pybind11;

namespace edge {
namespace {

using Bytes = py::array_t<int8_t, py::array::c_style | py::array::forcecast>;
using Sums = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// Tiles 0 += 1 * 2 of the arrays' shapes, the rest of tile 0's rows as they were in memory.
template <typename Tiles>
void multiply(const AmxConfig& config, const Bytes& left, const Bytes& right, Sums& sums) {
  const AmxShape<Tiles> shape(config);
  Tiles::template load<0>(sums.data(), sums.strides(0));
  Tiles::template load<1>(left.data(), left.strides(0));
  Tiles::template load<2>(right.data(), right.strides(0));
  Tiles::template multiply_add<0, 1, 2>();
  Tiles::template store<0>(sums.mutable_data(), sums.strides(0));
}

void check_tile(const char* name, const py::array& array, int64_t item_bytes) {
  if (array.ndim() == 2 && array.shape(0) >= 1 && array.shape(0) <= kAmxRows && array.shape(1) >= 1 &&
      array.shape(1) * item_bytes <= kAmxRowBytes) {
    return;
  }
  raise(error(Code::kBadArgument, "%s: expected up to %d rows of up to %d bytes", name, kAmxRows, kAmxRowBytes));
}

std::string amx_multiply(const std::string& isa, const Bytes& left, const Bytes& right, Sums& sums) {
  value(kernels_for(isa));
  check_tile("left", left, 1);
  check_tile("right", right, 1);
  check_tile("sums", sums, 4);
  AmxConfig config;
  config.set(0, static_cast<int>(sums.shape(0)), static_cast<int>(4 * sums.shape(1)));
  config.set(1, static_cast<int>(left.shape(0)), static_cast<int>(left.shape(1)));
  config.set(2, static_cast<int>(right.shape(0)), static_cast<int>(right.shape(1)));
  if (isa == "amx_model") {
    multiply<AmxModel>(config, left, right, sums);
    return AmxModel::fault();
  }
  const bool fits = left.shape(0) == sums.shape(0) && left.shape(1) == 4 * right.shape(0) &&
                    right.shape(1) == 4 * sums.shape(1);
  if (isa != "amx" || !fits) raise(error(Code::kBadArgument, "isa: expected amx or amx_model, and shapes that fit"));
  multiply<AmxHardware>(config, left, right, sums);
  return "";
}

// A table whose products of one format are another ISA's but for the last bit of the last row's first value.
GemvFn falsified = nullptr;
void gemv_falsified(const std::byte* tiles, int64_t k, const std::byte* acts, int64_t act_stride, int64_t n_rows,
                    float* y, int64_t y_stride, int64_t tile_begin, int64_t tile_end) {
  falsified(tiles, k, acts, act_stride, n_rows, y, y_stride, tile_begin, tile_end);
  uint32_t bits;
  float* last = y + (n_rows - 1) * y_stride;
  std::memcpy(&bits, last, sizeof bits);
  bits ^= 1;
  std::memcpy(last, &bits, sizeof bits);
}

std::string check_products(const std::string& found, const std::string& expected, int falsify) {
  GemvTable table = *value(gemv_table_for(found));
  if (falsify >= 0 && falsify < kTileFormats) {
    falsified = table.gemv[falsify];
    table.gemv[falsify] = gemv_falsified;
  }
  return gemv_difference(table, *value(gemv_table_for(expected)));
}

void bind_amx(py::module_& module) {
  module.def("amx_multiply", &amx_multiply, py::arg("isa"), py::arg("left"), py::arg("right"), py::arg("sums").noconvert(),
             "sums [m, n] int32 += left [m, 4k] int8 * right [k, 4n] int8, by one product of tiles, in place; m, k, n up to "
             "16. Of amx_model any shapes are taken: returns the first fault that a CPU would have raised, or ''.");
  module.def("amx_fault", [] { return std::string(AmxModel::fault()); },
             "The first fault of this thread's products by amx_model since it was last asked for, or ''.");
  module.def("gemv_difference", &check_products, py::arg("found"), py::arg("expected"), py::arg("falsify") = -1,
             "What differs between two ISAs' products in the check that amx has to pass before it may be chosen, or ''. "
             "One bit of the format `falsify` is made wrong on purpose.");
}

const Binding binding("amx", bind_amx);

}  // namespace
}  // namespace edge

#endif
