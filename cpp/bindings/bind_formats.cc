// Block types and tiles for the packer: sizes, decode, re-arrangement. Buffers are read in place, without the GIL.
#include <pybind11/numpy.h>

#include "bindings/binding.h"
#include "kernels/tiling.h"

namespace py = pybind11;

namespace edge {
namespace {

// The bytes of any contiguous buffer, held for the scope.
class Bytes {
 public:
  Bytes(const py::object& object, const char* name) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) == 0) return;
    PyErr_Clear();
    raise(error(Code::kBadArgument, "%s: expected a contiguous buffer of bytes, found %s", name,
                Py_TYPE(object.ptr())->tp_name));
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  std::span<const std::byte> span() const {
    return {static_cast<const std::byte*>(view_.buf), static_cast<size_t>(view_.len)};
  }

 private:
  Py_buffer view_{};
};

// Sizes come from file headers: beyond 63 bits is a wrong size, not a wrong type.
int64_t integer(const py::object& number, const char* name) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(number.ptr()));
  if (!index) {
    PyErr_Clear();
    raise(error(Code::kBadArgument, "%s: expected an integer, found %s", name, Py_TYPE(number.ptr())->tp_name));
  }
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) raise(error(Code::kBadArgument, "%s: expected an integer within 64 bits, found more", name));
  return result;
}

// The block type, its grid fetched from Python on first use.
const BlockTraits& block_type(const py::object& ggml_type, const char* name) {
  const BlockTraits* block = value(find_block_type(integer(ggml_type, name)));
  if (!grid_ready(*block)) py::module_::import("flashload.iq_grids").attr("load")(block->ggml_type);
  return *block;
}

WeightFormat tile_format(const py::object& number) {
  const int64_t format = integer(number, "format");
  if (format < 0 || format >= kTileFormats)
    raise(error(Code::kBadArgument, "tile format: expected 0..%d, found %lld", kTileFormats - 1,
                static_cast<long long>(format)));
  return static_cast<WeightFormat>(format);
}

py::array_t<float> float_array(std::vector<py::ssize_t> shape) { return py::array_t<float>(std::move(shape)); }

std::span<float> span_of(py::array_t<float>& array) {
  return {array.mutable_data(), static_cast<size_t>(array.size())};
}

py::tuple py_block_type(const py::object& ggml_type) {
  const BlockTraits& block = *value(find_block_type(integer(ggml_type, "ggml_type")));
  return py::make_tuple(block.name, block.block_values, block.block_bytes);
}

void py_set_grid(const py::object& ggml_type, const py::object& values) {
  const Bytes bytes(values, "values");
  const auto span = bytes.span();
  check(set_grid(integer(ggml_type, "ggml_type"), {reinterpret_cast<const int8_t*>(span.data()), span.size()}));
}

py::array_t<float> py_decode_blocks(const py::object& ggml_type, const py::object& data, const py::object& n_values) {
  const BlockTraits& block = block_type(ggml_type, "ggml_type");
  const Bytes bytes(data, "data");
  const int64_t n = integer(n_values, "n_values");
  // Before the output is allocated: the size asked for must be what the data holds.
  const int64_t held = static_cast<int64_t>(bytes.span().size()) / block.block_bytes * block.block_values;
  if (n != held || bytes.span().size() % static_cast<size_t>(block.block_bytes) != 0)
    raise(error(Code::kBadArgument, "%s: expected %lld values in whole blocks of %lld bytes, found %zu bytes",
                block.name, static_cast<long long>(n), static_cast<long long>(block.block_bytes),
                bytes.span().size()));
  py::array_t<float> out = float_array({n});
  const std::span<float> values = span_of(out);
  Status status;
  {
    const py::gil_scoped_release unlocked;
    status = decode_blocks(block, bytes.span(), values);
  }
  check(status);
  return out;
}

int64_t py_tile_bytes(const py::object& format, const py::object& rows, const py::object& k) {
  return value(checked_tile_bytes(tile_format(format), integer(rows, "rows"), integer(k, "k")));
}

py::bytes py_tile_rows(const py::object& src_type, const py::object& dst_format, const py::object& rows,
                       const py::object& n_rows, const py::object& k) {
  const BlockTraits& source = block_type(src_type, "src_type");
  const WeightFormat format = tile_format(dst_format);
  const int64_t row_count = integer(n_rows, "n_rows"), cols = integer(k, "k");
  const Bytes bytes(rows, "rows");
  check(check_rows(source, bytes.span(), row_count, cols));
  const int64_t size = value(checked_tile_bytes(format, row_count, cols));
  auto out = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, size));
  if (!out) throw py::error_already_set();
  const std::span<std::byte> tiles{reinterpret_cast<std::byte*>(PyBytes_AS_STRING(out.ptr())),
                                   static_cast<size_t>(size)};
  Status status;
  {
    const py::gil_scoped_release unlocked;
    status = tile_rows(source, bytes.span(), row_count, cols, format, tiles);
  }
  check(status);
  return out;
}

py::array_t<float> py_untile_rows(const py::object& format, const py::object& tiles, const py::object& rows,
                                  const py::object& k) {
  const WeightFormat tile = tile_format(format);
  const int64_t row_count = integer(rows, "rows"), cols = integer(k, "k");
  const Bytes bytes(tiles, "tiles");
  check(check_tiles(tile, bytes.span(), row_count, cols));
  py::array_t<float> out = float_array({row_count, cols});
  const std::span<float> values = span_of(out);
  Status status;
  {
    const py::gil_scoped_release unlocked;
    status = untile_rows(tile, bytes.span(), row_count, cols, values);
  }
  check(status);
  return out;
}

void bind_formats(py::module_& module) {
  module.def("block_type", &py_block_type, py::arg("ggml_type"),
             "(name, block_values, block_bytes) of a ggml block type; UnsupportedModelError lists the known ids.");
  module.def("set_grid", &py_set_grid, py::arg("ggml_type"), py::arg("values"),
             "Sets the grid of an IQ1, IQ2 or IQ3 type: its entries as signed bytes, one after the other. "
             "ArgumentError on a wrong size, or other values than before.");
  module.def("decode_blocks", &py_decode_blocks, py::arg("ggml_type"), py::arg("data"), py::arg("n_values"),
             "Blocks -> float32 [n_values], with the bits of gguf.quants.dequantize. ArgumentError when data is not "
             "exactly n_values; UnsupportedModelError for an unknown type, or an IQ type without the gguf package.");
  module.def("tile_bytes", &py_tile_bytes, py::arg("format"), py::arg("rows"), py::arg("k"),
             "Bytes of a matrix [rows, k] in tiles of 16 rows. ArgumentError when k does not fill the format's "
             "blocks.");
  module.def("tile_rows", &py_tile_rows, py::arg("src_type"), py::arg("dst_format"), py::arg("rows"), py::arg("n_rows"),
             py::arg("k"),
             "Rows of blocks [n_rows, k] -> tile bytes, rows filled up with zeros to 16. The format's own type keeps "
             "every bit; others go through float32 and are rounded as gguf.quants.quantize does. ArgumentError when a "
             "size does not fit; UnsupportedModelError for tiles that are not rounded to (all but F32, F16, "
             "BF16, Q8_0, Q4_0) from another type.");
  module.def("untile_rows", &py_untile_rows, py::arg("format"), py::arg("tiles"), py::arg("rows"), py::arg("k"),
             "Tile bytes -> float32 [rows, k]. ArgumentError when a size does not fit.");
}

const Binding binding("formats", bind_formats);

}  // namespace
}  // namespace edge
