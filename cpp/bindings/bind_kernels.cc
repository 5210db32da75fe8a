// Test and benchmark access to the matrix products of any ISA. Formats are the codes of WeightFormat.
#include <pybind11/numpy.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <ctime>
#include <span>

#include "bindings/binding.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "kernels/registry.h"
#include "kernels/tiling.h"

namespace py = pybind11;

namespace edge {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Clock = std::chrono::steady_clock;

// Tiles one thread takes at once: the engine's own rule (model/linear.cc) for a matrix of its own.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kReadPieceBytes = int64_t{1} << 20;
constexpr int64_t kMaxBenchBytes = int64_t{1} << 36;

WeightFormat tile_format(uint32_t code) {
  const auto format = static_cast<WeightFormat>(code);
  if (!is_tile_format(format)) {
    raise(error(Code::kBadArgument, "format: expected a tile format 0..%d, found %u", kTileFormats - 1, code));
  }
  return format;
}

void check_range(const char* name, int64_t found, int64_t low, int64_t high) {
  if (found >= low && found <= high) return;
  raise(error(Code::kBadArgument, "%s: expected %lld..%lld, found %lld", name, static_cast<long long>(low),
              static_cast<long long>(high), static_cast<long long>(found)));
}

// n_rows rows of k floats as the kernel of a format takes them, made by this ISA.
std::vector<std::byte> activations(const Kernels& kernels, ActKind kind, const float* x, int64_t n_rows, int64_t k) {
  const int64_t stride = act_row_bytes(kind, k);
  std::vector<std::byte> acts(static_cast<size_t>(n_rows * stride));
  for (int64_t m = 0; m < n_rows; ++m) {
    std::byte* row = acts.data() + m * stride;
    switch (kind) {
      case ActKind::kF32: std::memcpy(row, x + m * k, static_cast<size_t>(stride)); break;
      case ActKind::kQ8x32: kernels.quantize_q8x32(x + m * k, k, reinterpret_cast<ActQ8x32*>(row)); break;
      case ActKind::kQ8x256: kernels.quantize_q8x256(x + m * k, k, reinterpret_cast<ActQ8x256*>(row)); break;
    }
  }
  return acts;
}

Floats py_gemv(const std::string& isa, uint32_t code, const py::buffer& tiles, int64_t rows, int64_t k,
               const Floats& x) {
  const Kernels& kernels = *value(kernels_for(isa));
  const WeightFormat format = tile_format(code);
  const py::buffer_info info = tiles.request();
  const auto* weights = static_cast<const std::byte*>(info.ptr);
  check(check_tiles(format, {weights, static_cast<size_t>(info.size * info.itemsize)}, rows, k));
  if (x.ndim() != 2 || x.shape(1) != k) {
    raise(error(Code::kBadArgument, "x: expected a float32 array [m, %lld]", static_cast<long long>(k)));
  }
  const int64_t m = x.shape(0);
  check_range("rows of x", m, 1, 1 << 20);
  const ActKind kind = act_kind(format);
  const std::vector<std::byte> acts = activations(kernels, kind, x.data(), m, k);
  const int64_t y_stride = tile_count(rows) * kTileRows;
  std::vector<float> y(static_cast<size_t>(m * y_stride));
  kernels.gemv[code](weights, k, acts.data(), act_row_bytes(kind, k), m, y.data(), y_stride, 0, tile_count(rows));
  Floats out({m, rows});
  for (int64_t i = 0; i < m; ++i) {
    std::memcpy(out.mutable_data(i, 0), y.data() + i * y_stride, static_cast<size_t>(rows) * sizeof(float));
  }
  return out;
}

py::bytes py_quantize(const std::string& isa, const std::string& kind, const Floats& x) {
  const Kernels& kernels = *value(kernels_for(isa));
  const bool small = kind == "q8x32";
  if (!small && kind != "q8x256") {
    raise(error(Code::kBadArgument, "kind: expected q8x32 or q8x256, found '%s'", kind.c_str()));
  }
  const int64_t block = small ? 32 : 256;
  if (x.size() % block != 0) {
    raise(error(Code::kBadArgument, "x: expected a multiple of %lld values, found %lld", static_cast<long long>(block),
                static_cast<long long>(x.size())));
  }
  const std::vector<std::byte> acts =
      activations(kernels, small ? ActKind::kQ8x32 : ActKind::kQ8x256, x.data(), 1, x.size());
  return {reinterpret_cast<const char*>(acts.data()), acts.size()};
}

// Zeroed pages, as the budget's pools get theirs.
class Pages {
 public:
  explicit Pages(int64_t n_bytes) : n_bytes_(static_cast<size_t>(n_bytes)) {
    void* data = mmap(nullptr, n_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data_ = data == MAP_FAILED ? nullptr : static_cast<std::byte*>(data);
    if (data_ == nullptr) raise(error(Code::kOverBudget, "benchmark: cannot map %zu bytes", n_bytes_));
  }
  ~Pages() { munmap(data_, n_bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::byte* data() const { return data_; }

 private:
  size_t n_bytes_;
  std::byte* data_ = nullptr;
};

uint64_t next_random(uint64_t& state) {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// Random quants under ordinary scales: subnormals or NaNs would time the FPU's slow paths instead.
void fill_tiles(WeightFormat format, std::byte* tiles, int64_t n_bytes, uint64_t seed) {
  uint64_t state = seed;
  for (int64_t i = 0; i < n_bytes; i += 8) {
    uint64_t bits = next_random(state);
    // Clears each half's top exponent bit and sets the next: 2^-7..2 as f16, small as bf16 and in the high half of f32.
    if (format <= WeightFormat::kBF16) bits = (bits & 0xbfffbfffbfffbfffu) | 0x2000200020002000u;
    std::memcpy(tiles + i, &bits, 8);
  }
  if (format <= WeightFormat::kBF16) return;
  const FormatTraits& of = traits(format);
  for (int64_t at = 0; at < n_bytes; at += of.tile_block_bytes) {
    if (of.scales == Scales::kExponent) {
      for (int64_t r = 0; r < kTileRows; ++r) tiles[at + r] = static_cast<std::byte>(112 + next_random(state) % 8);
      continue;
    }
    for (int64_t i = 0; i < (of.scales == Scales::kTwoHalves ? 2 : 1) * kTileRows; ++i) {
      const auto half = static_cast<uint16_t>(0x2000 + (next_random(state) & 0x3ff));
      std::memcpy(tiles + at + 2 * i, &half, 2);
    }
  }
}

// Processor time of a pass, added up by its threads as they work: the process's own clock counts other threads late.
class Busy {
 public:
  // A piece of work of this thread; of no pass (null) it costs nothing.
  class Here {
   public:
    explicit Here(Busy* busy) : busy_(busy), start_ns_(busy == nullptr ? 0 : now_ns()) {}
    ~Here() {
      if (busy_ != nullptr) busy_->ns_ += now_ns() - start_ns_;
    }
    Here(const Here&) = delete;
    Here& operator=(const Here&) = delete;

   private:
    Busy* busy_;
    int64_t start_ns_;
  };
  double seconds() const { return 1e-9 * static_cast<double>(ns_); }

 private:
  static int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return int64_t{1000000000} * time.tv_sec + time.tv_nsec;
  }
  std::atomic<int64_t> ns_ = 0;
};

// Wall time and CPU time of passes; the second, divided by the threads, leaves out what the scheduler gave to others.
struct Passes {
  std::vector<double> wall_s, cpu_s;

  template <typename Pass>
  void time(const Pass& pass) {
    const auto start = Clock::now();
    pass(nullptr);
    wall_s.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    // Once more, because looking at this clock takes a good part of a short pass.
    Busy busy;
    pass(&busy);
    cpu_s.push_back(busy.seconds());
  }
};

void read_pass(const GemvTable& table, ThreadPool& pool, const std::byte* data, int64_t n_bytes, Busy* busy) {
  std::atomic<uint64_t> sink = 0;
  pool.parallel(n_bytes / kReadPieceBytes, 1, [&](int64_t begin, int64_t end, int) {
    const Busy::Here here(busy);
    sink += table.read_bytes(data + begin * kReadPieceBytes, (end - begin) * kReadPieceBytes);
  });
}

py::dict py_bench_gemv(const std::string& isa, uint32_t code, int64_t rows, int64_t k, int64_t m, int64_t n_matrices,
                       int n_threads, double seconds) {
  const Kernels& kernels = *value(kernels_for(isa));
  const GemvTable& table = *value(gemv_table_for(isa));
  const WeightFormat format = tile_format(code);
  const int64_t matrix_bytes = value(checked_tile_bytes(format, rows, k));
  check_range("m", m, 1, 4096);
  check_range("n_threads", n_threads, 1, 256);
  check_range("n_matrices", n_matrices, 1, std::max<int64_t>(1, kMaxBenchBytes / matrix_bytes));
  const int64_t read_bytes = (matrix_bytes * n_matrices + kReadPieceBytes - 1) / kReadPieceBytes * kReadPieceBytes;
  const Pages weights(read_bytes + 8);
  Passes gemv, read;
  {
    const py::gil_scoped_release unlocked;
    fill_tiles(format, weights.data(), matrix_bytes * n_matrices, 88172645463325252u);
    std::vector<float> x(static_cast<size_t>(m * k));
    uint64_t state = 1234567;
    for (float& value : x) value = static_cast<float>(next_random(state) >> 40) * 0x1p-23f - 1.0f;
    const ActKind kind = act_kind(format);
    const std::vector<std::byte> acts = activations(kernels, kind, x.data(), m, k);
    const int64_t n_tiles = tile_count(rows);
    std::vector<float> y(static_cast<size_t>(m * n_tiles * kTileRows));
    ThreadPool pool(n_threads);
    const int64_t grain = std::max<int64_t>(1, n_tiles / (n_threads * kPiecesPerThread));
    const auto gemv_pass = [&](Busy* busy) {
      for (int64_t i = 0; i < n_matrices; ++i) {
        pool.parallel(n_tiles, grain, [&](int64_t begin, int64_t end, int) {
          const Busy::Here here(busy);
          kernels.gemv[code](weights.data() + i * matrix_bytes, k, acts.data(), act_row_bytes(kind, k), m, y.data(),
                             n_tiles * kTileRows, begin, end);
        });
      }
    };
    // One pass of each in turn, so that a busy neighbour slows both.
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    gemv_pass(nullptr);
    do {
      read.time([&](Busy* busy) { read_pass(table, pool, weights.data(), read_bytes, busy); });
      gemv.time(gemv_pass);
    } while (Clock::now() < end);
  }
  py::dict result;
  result["gemv_bytes"] = matrix_bytes * n_matrices;
  result["read_bytes"] = read_bytes;
  result["gemv_seconds"] = gemv.wall_s;
  result["gemv_cpu_seconds"] = gemv.cpu_s;
  result["read_seconds"] = read.wall_s;
  result["read_cpu_seconds"] = read.cpu_s;
  return result;
}

double py_read_bandwidth(int n_threads, int64_t n_bytes, double seconds, const std::string& isa) {
  const std::string name = isa.empty() ? value(default_kernels())->isa : isa;
  const GemvTable& table = *value(gemv_table_for(name));
  check_range("n_threads", n_threads, 1, 256);
  check_range("n_bytes", n_bytes, kReadPieceBytes, kMaxBenchBytes);
  n_bytes = n_bytes / kReadPieceBytes * kReadPieceBytes;
  const Pages pages(n_bytes);
  Passes read;
  {
    const py::gil_scoped_release unlocked;
    fill_tiles(WeightFormat::kF32, pages.data(), n_bytes, 1);
    ThreadPool pool(n_threads);
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    do {
      read.time([&](Busy* busy) { read_pass(table, pool, pages.data(), n_bytes, busy); });
    } while (Clock::now() < end);
  }
  return static_cast<double>(n_bytes) / *std::min_element(read.wall_s.begin(), read.wall_s.end()) * 1e-9;
}

double py_int8_rate(int n_threads, double seconds, const std::string& isa) {
  const std::string name = isa.empty() ? value(default_kernels())->isa : isa;
  const GemvTable& table = *value(gemv_table_for(name));
  check_range("n_threads", n_threads, 1, 256);
  constexpr int64_t kSteps = 1 << 14, kPieces = 64;
  double best = 0;
  {
    const py::gil_scoped_release unlocked;
    ThreadPool pool(n_threads);
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    do {
      std::atomic<int64_t> n = 0;
      const auto start = Clock::now();
      pool.parallel(kPieces, 1, [&](int64_t begin, int64_t end, int) { n += table.multiply_int8((end - begin) * kSteps); });
      best = std::max(best, 2.0 * static_cast<double>(n) / std::chrono::duration<double>(Clock::now() - start).count());
    } while (Clock::now() < end);
  }
  return best;
}

void bind_kernels(py::module_& module) {
  module.def("isas", [] { return availability(list_isas()); },
             "The ISAs of this build, best first: dicts with name, available, and the reason when it is not.");
  module.def("default_isa", [] { return std::string(value(default_kernels())->isa); },
             "The ISA a model would run with now: EDGE_ISA, else the best available. ArgumentError lists the names "
             "when EDGE_ISA is unknown; UnsupportedModelError when this CPU cannot run it.");
  module.def("gemv", &py_gemv, py::arg("isa"), py::arg("format"), py::arg("tiles"), py::arg("rows"), py::arg("k"),
             py::arg("x"),
             "x [m, k] float32 times the tiles of a matrix [rows, k], transposed -> float32 [m, rows]. Activations are "
             "quantised by the same ISA. ArgumentError when a size does not fit.");
  module.def("quantize", &py_quantize, py::arg("isa"), py::arg("kind"), py::arg("x"),
             "Activation blocks of kind q8x32 or q8x256 as bytes (ActQ8x32, ActQ8x256 of kernels.h).");
  module.def("bench_gemv", &py_bench_gemv, py::arg("isa"), py::arg("format"), py::arg("rows"), py::arg("k"),
             py::arg("m"), py::arg("n_matrices"), py::arg("n_threads"), py::arg("seconds"),
             "Passes over n_matrices random matrices, in turn with plain read passes over the same memory: a dict of "
             "gemv_bytes, read_bytes per pass, and lists with one value per pass: gemv_seconds, read_seconds (wall), "
             "gemv_cpu_seconds, read_cpu_seconds (at work, sum of all threads).");
  module.def("read_bandwidth", &py_read_bandwidth, py::arg("n_threads"), py::arg("n_bytes"), py::arg("seconds"),
             py::arg("isa") = "", "GB/s of the fastest plain read pass over n_bytes of memory.");
  module.def("int8_rate", &py_int8_rate, py::arg("n_threads"), py::arg("seconds"), py::arg("isa") = "",
             "Operations per second (a multiplication and an addition are two) of the fastest pass of int8 multiply-adds "
             "in registers: what the ISA can do when nothing has to be fetched or unpacked.");
}

const Binding binding("kernels", bind_kernels);

}  // namespace
}  // namespace edge
