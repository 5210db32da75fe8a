// Neuron records for the packer, and test and benchmark access to the kernels over them.
#include <pybind11/numpy.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <span>

#include "bindings/binding.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "kernels/neuron_rows.h"
#include "kernels/tiling.h"

namespace py = pybind11;

namespace edge {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Clock = std::chrono::steady_clock;

std::span<const std::byte> span_of(const py::buffer_info& info) {
  return {static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

Bytes py_neuron_rows(uint32_t ggml_type, uint32_t code, const py::buffer& rows, int64_t n_rows, int64_t hidden,
                     bool column) {
  const BlockTraits* block = value(find_block_type(ggml_type));
  if (!grid_ready(*block)) py::module_::import("flashload.iq_grids").attr("load")(block->ggml_type);
  const auto format = static_cast<WeightFormat>(code);
  const int64_t n_bytes = value(checked_neuron_bytes(format, n_rows, hidden));
  const py::buffer_info info = rows.request();
  check(check_rows(*block, span_of(info), n_rows, hidden));
  Bytes out({n_rows, n_bytes / n_rows});
  const std::span<std::byte> into{reinterpret_cast<std::byte*>(out.mutable_data()), static_cast<size_t>(n_bytes)};
  const Status status = [&] {
    const py::gil_scoped_release unlocked;
    return neuron_rows(*block, span_of(info), n_rows, hidden, format, column, into);
  }();
  check(status);
  return out;
}

// Rows side by side in a buffer.
struct Rows {
  py::buffer_info info;
  std::vector<const std::byte*> at;

  Rows(const py::buffer& buffer, WeightFormat format, int64_t hidden) : info(buffer.request()) {
    const int64_t row_bytes = value(checked_neuron_bytes(format, 1, hidden));
    const auto n_bytes = static_cast<int64_t>(span_of(info).size());
    if (n_bytes % row_bytes != 0) {
      raise(error(Code::kBadArgument, "rows: expected a multiple of %lld bytes, found %lld",
                  static_cast<long long>(row_bytes), static_cast<long long>(n_bytes)));
    }
    for (int64_t i = 0; i < n_bytes; i += row_bytes) at.push_back(span_of(info).data() + i);
  }
  int64_t n() const { return static_cast<int64_t>(at.size()); }
};

std::vector<std::byte> activations(const Kernels& kernels, WeightFormat format, const Floats& x, int64_t hidden) {
  if (x.ndim() != 2 || x.shape(1) != hidden) {
    raise(error(Code::kBadArgument, "x: expected a float32 array [m, %lld]", static_cast<long long>(hidden)));
  }
  const int64_t stride = neuron_act_bytes(format, hidden);
  std::vector<std::byte> acts(static_cast<size_t>(x.shape(0) * stride));
  for (int64_t m = 0; m < x.shape(0); ++m) {
    kernels.neuron.act[neuron_index(format)](x.data(m, 0), hidden, acts.data() + m * stride);
  }
  return acts;
}

py::bytes py_neuron_act(const std::string& isa, uint32_t code, const Floats& x) {
  const auto format = static_cast<WeightFormat>(code);
  if (x.ndim() != 2) raise(error(Code::kBadArgument, "x: expected a float32 array [m, hidden]"));
  value(checked_neuron_bytes(format, 1, x.shape(1)));
  const std::vector<std::byte> acts = activations(*value(kernels_for(isa)), format, x, x.shape(1));
  return {reinterpret_cast<const char*>(acts.data()), acts.size()};
}

Floats py_neuron_dot(const std::string& isa, uint32_t code, const py::buffer& buffer, int64_t hidden, const Floats& x) {
  const Kernels& kernels = *value(kernels_for(isa));
  const auto format = static_cast<WeightFormat>(code);
  const Rows rows(buffer, format, hidden);
  const std::vector<std::byte> acts = activations(kernels, format, x, hidden);
  Floats out({static_cast<int64_t>(x.shape(0)), rows.n()});
  kernels.neuron.dot[neuron_index(format)](rows.at.data(), rows.n(), hidden, acts.data(),
                                           neuron_act_bytes(format, hidden), x.shape(0), out.mutable_data(), rows.n());
  return out;
}

Floats py_neuron_axpy(const std::string& isa, uint32_t code, const py::buffer& buffer, int64_t hidden, const Floats& a,
                      const Floats& start, int64_t begin, int64_t end) {
  const Kernels& kernels = *value(kernels_for(isa));
  const auto format = static_cast<WeightFormat>(code);
  const Rows cols(buffer, format, hidden);
  const int64_t room = (hidden + 31) / 32 * 32;
  if (a.size() != cols.n() || start.size() != room || begin < 0 || begin % 32 != 0 || end % 32 != 0 || end > room) {
    raise(error(Code::kBadArgument, "axpy: expected a [%lld], out [%lld] and a range of whole 32s in it",
                static_cast<long long>(cols.n()), static_cast<long long>(room)));
  }
  Floats out({room});
  std::memcpy(out.mutable_data(), start.data(), static_cast<size_t>(room) * sizeof(float));
  kernels.neuron.axpy[neuron_index(format)](cols.at.data(), a.data(), cols.n(), begin, end, out.mutable_data());
  return out;
}

// Records of three rows with ordinary scales at random places of memory larger than the caches.
struct Scattered {
  std::vector<std::byte> memory;
  int64_t n_records, row_bytes;

  Scattered(WeightFormat format, int64_t hidden, int64_t n) : n_records(n), row_bytes(neuron_row_bytes(format, hidden)) {
    memory.resize(static_cast<size_t>(3 * n * row_bytes));
    const int64_t group_bytes = kNeuronTraits[neuron_index(format)].group_bytes;
    const int64_t n_halves = format == WeightFormat::kNeuronF16 ? 256 : 8;
    for (size_t i = 0; i < memory.size(); i += 8) {
      const uint64_t bits = next();
      std::memcpy(memory.data() + i, &bits, 8);
    }
    for (size_t at = 0; at < memory.size(); at += static_cast<size_t>(group_bytes)) {
      for (int64_t i = 0; i < n_halves; ++i) {
        const auto half = static_cast<uint16_t>(0x2000 + (next() & 0x3ff));
        std::memcpy(memory.data() + at + 2 * i, &half, 2);
      }
    }
  }
  uint64_t next() {  // xorshift64
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  std::vector<const std::byte*> pick(int64_t n, int64_t part) {
    std::vector<const std::byte*> rows;
    for (int64_t i = 0; i < n; ++i) {
      const auto record = static_cast<int64_t>(next() % static_cast<uint64_t>(n_records));
      rows.push_back(memory.data() + (3 * record + part) * row_bytes);
    }
    return rows;
  }
  uint64_t state = 88172645463325252u;
};

py::dict py_bench_neurons(const std::string& isa, uint32_t code, int64_t hidden, int64_t n_records, int64_t n_active,
                          int64_t m, int n_threads, double seconds) {
  const Kernels& kernels = *value(kernels_for(isa));
  const auto format = static_cast<WeightFormat>(code);
  const int64_t n_bytes = value(checked_neuron_bytes(format, n_active, hidden));
  if (n_records < 1 || n_records > int64_t{1} << 20 || m < 1 || m > 1024 || n_threads < 1 || n_threads > 256) {
    raise(error(Code::kBadArgument, "bench: expected 1 to 2^20 records, 1 to 1024 rows and 1 to 256 threads"));
  }
  std::vector<double> dot_s, axpy_s;
  {
    const py::gil_scoped_release unlocked;
    Scattered records(format, hidden, n_records);
    ThreadPool pool(n_threads);
    const int index = neuron_index(format);
    const int64_t stride = neuron_act_bytes(format, hidden);
    const int64_t room = (hidden + 31) / 32 * 32;
    std::vector<float> x(static_cast<size_t>(m * hidden)), a(static_cast<size_t>(n_active)),
        out(static_cast<size_t>(std::max(m * n_active, m * room)));
    for (float& value : x) value = static_cast<float>(records.next() >> 40) * 0x1p-23f - 1.0f;
    for (float& value : a) value = static_cast<float>(records.next() >> 40) * 0x1p-24f + 0x1p-25f;
    std::vector<std::byte> acts(static_cast<size_t>(m * stride));
    for (int64_t i = 0; i < m; ++i) kernels.neuron.act[index](x.data() + i * hidden, hidden, acts.data() + i * stride);
    const auto time = [](std::vector<double>& times, const auto& pass) {
      const auto start = Clock::now();
      pass();
      times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    };
    const auto stop = Clock::now() + std::chrono::duration<double>(seconds);
    do {
      const std::vector<const std::byte*> rows = records.pick(n_active, 1);
      time(dot_s, [&] {
        pool.parallel(n_active, std::max<int64_t>(1, n_active / (4 * n_threads)), [&](int64_t begin, int64_t end, int) {
          kernels.neuron.dot[index](rows.data() + begin, end - begin, hidden, acts.data(), stride, m,
                                    out.data() + begin, n_active);
        });
      });
      const std::vector<const std::byte*> cols = records.pick(n_active, 2);
      std::fill(out.begin(), out.end(), 0.0f);
      time(axpy_s, [&] {
        const int64_t n_pieces = room / 32;
        pool.parallel(n_pieces, (n_pieces + n_threads - 1) / n_threads, [&](int64_t begin, int64_t end, int) {
          for (int64_t i = 0; i < m; ++i) {
            kernels.neuron.axpy[index](cols.data(), a.data(), n_active, 32 * begin, 32 * end, out.data() + i * room);
          }
        });
      });
    } while (Clock::now() < stop);
  }
  py::dict result;
  result["bytes"] = n_bytes;
  result["dot_seconds"] = dot_s;
  result["axpy_seconds"] = axpy_s;
  return result;
}

void bind_neuron(py::module_& module) {
  module.def("neuron_rows", &py_neuron_rows, py::arg("ggml_type"), py::arg("format"), py::arg("rows"),
             py::arg("n_rows"), py::arg("hidden"), py::arg("column"),
             "Checkpoint rows [n_rows, hidden] of a block type -> uint8 [n_rows, row bytes] of a neuron format, as dot "
             "rows or as column rows. ArgumentError when a size does not fit.");
  module.def("neuron_act", &py_neuron_act, py::arg("isa"), py::arg("format"), py::arg("x"),
             "x [m, hidden] float32 as the dot kernel of a neuron format takes it (kernels/neuron.h), m rows of bytes.");
  module.def("neuron_dot", &py_neuron_dot, py::arg("isa"), py::arg("format"), py::arg("rows"), py::arg("hidden"),
             py::arg("x"), "Dot rows side by side times x [m, hidden] float32 -> float32 [m, rows].");
  module.def("neuron_axpy", &py_neuron_axpy, py::arg("isa"), py::arg("format"), py::arg("cols"), py::arg("hidden"),
             py::arg("a"), py::arg("out"), py::arg("begin"), py::arg("end"),
             "out plus column rows side by side times a, values [begin, end); out is float32 [hidden rounded up to 32].");
  module.def("bench_neurons", &py_bench_neurons, py::arg("isa"), py::arg("format"), py::arg("hidden"),
             py::arg("n_records"), py::arg("n_active"), py::arg("m"), py::arg("n_threads"), py::arg("seconds"),
             "Passes over n_active records picked at random of n_records: a dict of bytes (of one row or column of "
             "each), and dot_seconds and axpy_seconds with one value per pass (m activation rows).");
}

const Binding binding("neuron", bind_neuron);

}  // namespace
}  // namespace edge
