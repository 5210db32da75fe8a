// Benchmark access to whole products as the engine makes them: quantise the rows, then share the tiles among the threads.
#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "bindings/binding.h"
#include "kernels/gemv_table.h"
#include "kernels/registry.h"
#include "kernels/tiling.h"
#include "model/linear.h"

namespace py = pybind11;

namespace edge {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Tiles one thread takes at once: the engine's own rule (model/linear.cc) for a matrix of its own.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kReadPieceBytes = int64_t{1} << 18;
constexpr int64_t kMaxRows = 4096, kMaxCopies = 4096;

// Copies of one matrix of tiles, one behind the other, so that together they are larger than the caches.
class ProductBench {
 public:
  ProductBench(const std::string& isa, uint32_t code, const py::buffer& tiles, int64_t rows, int64_t k, int64_t copies,
               int n_threads)
      : kernels_(*value(kernels_for(isa))), table_(*value(gemv_table_for(isa))), format_(code), rows_(rows), k_(k),
        copies_(copies), pool_(n_threads) {
    const py::buffer_info info = tiles.request();
    matrix_bytes_ = info.size * info.itemsize;
    if (code >= kTileFormats || copies < 1 || copies > kMaxCopies || n_threads < 1) {
      raise(error(Code::kBadArgument, "products: expected a tile format, 1..%lld copies and threads, found %u, %lld and %d",
                  static_cast<long long>(kMaxCopies), code, static_cast<long long>(copies), n_threads));
    }
    const auto* bytes = static_cast<const std::byte*>(info.ptr);
    check(check_tiles(static_cast<WeightFormat>(code), {bytes, static_cast<size_t>(matrix_bytes_)}, rows, k));
    weights_ = reserve(copies * matrix_bytes_);
    for (int64_t i = 0; i < copies; ++i) {
      std::memcpy(weights_.data() + i * matrix_bytes_, bytes, static_cast<size_t>(matrix_bytes_));
    }
  }

  // Rows that the next passes multiply, at most `most_rows` of them at once.
  void set_rows(const Floats& x, int64_t most_rows) {
    if (x.ndim() != 2 || x.shape(1) != k_ || x.shape(0) < 1 || x.shape(0) > kMaxRows || most_rows < 1) {
      raise(error(Code::kBadArgument, "x: expected 1..%lld rows of %lld values, and at least 1 at once",
                  static_cast<long long>(kMaxRows), static_cast<long long>(k_)));
    }
    x_ = x;
    most_rows_ = std::min(most_rows, x.shape(0));
    quantised_ = reserve(static_cast<int64_t>(ActRows::bytes(most_rows_, k_)));
    y_ = reserve(copies_ * x.shape(0) * y_stride() * static_cast<int64_t>(sizeof(float)));
  }

  // One pass: the rows times every copy.
  void multiply() {
    if (y_.bytes() == 0) raise(error(Code::kBadArgument, "products: no rows are set"));
    const float* x = x_.data();
    const int64_t n_rows = x_.shape(0);
    const py::gil_scoped_release unlocked;
    for (int64_t copy = 0; copy < copies_; ++copy) {
      for (int64_t row = 0; row < n_rows; row += most_rows_) {
        multiply(x + row * k_, std::min(most_rows_, n_rows - row), copy,
                 y_.as<float>() + (copy * n_rows + row) * y_stride());
      }
    }
  }

  Floats product(int64_t copy) const {
    if (copy < 0 || copy >= copies_ || y_.bytes() == 0) raise(error(Code::kBadArgument, "products: no such copy"));
    Floats out({x_.shape(0), rows_});
    for (int64_t i = 0; i < x_.shape(0); ++i) {
      std::memcpy(out.mutable_data(i, 0), y_.as<float>() + (copy * x_.shape(0) + i) * y_stride(),
                  static_cast<size_t>(rows_) * sizeof(float));
    }
    return out;
  }

  // One pass of plain reads over all copies; returns its bytes.
  int64_t read() {
    const auto n_bytes = static_cast<int64_t>(weights_.bytes());
    const py::gil_scoped_release unlocked;
    pool_.parallel((n_bytes + kReadPieceBytes - 1) / kReadPieceBytes, 1, [&](int64_t begin, int64_t end, int) {
      const int64_t first = begin * kReadPieceBytes;
      sink_ += table_.read_bytes(weights_.data() + first, std::min(end * kReadPieceBytes, n_bytes) - first);
    });
    return n_bytes;
  }

 private:
  int64_t y_stride() const { return tile_count(rows_) * kTileRows; }
  Block reserve(int64_t n_bytes) { return value(budget_.reserve(static_cast<uint64_t>(n_bytes), "products")); }

  void multiply(const float* x, int64_t n_rows, int64_t copy, float* y) {
    ActRows acts(kernels_, pool_, quantised_.span());
    acts.set(x, k_, n_rows, k_);
    int64_t stride_bytes = 0;
    const std::byte* rows = acts.rows(act_kind(static_cast<WeightFormat>(format_)), &stride_bytes);
    const std::byte* weights = weights_.data() + copy * matrix_bytes_;
    const int64_t n_tiles = tile_count(rows_);
    const int64_t grain = std::max<int64_t>(1, n_tiles / (pool_.size() * kPiecesPerThread));
    pool_.parallel(n_tiles, grain, [&](int64_t begin, int64_t end, int) {
      kernels_.gemv[format_](weights, k_, rows, stride_bytes, n_rows, y, y_stride(), begin, end);
    });
  }

  const Kernels& kernels_;
  const GemvTable& table_;
  uint32_t format_;
  int64_t rows_, k_, copies_;
  int64_t matrix_bytes_ = 0, most_rows_ = 1;
  Budget budget_{uint64_t{1} << 40};
  Block weights_, quantised_, y_;
  Floats x_;
  std::atomic<uint64_t> sink_ = 0;
  ThreadPool pool_;
};

void bind_products(py::module_& module) {
  py::class_<ProductBench>(module, "ProductBench",
                           "Copies of one matrix of tiles [rows, k] and the products of rows with all of them, on a pool of "
                           "threads of its own. ArgumentError when a size does not fit.")
      .def(py::init<const std::string&, uint32_t, const py::buffer&, int64_t, int64_t, int64_t, int>(), py::arg("isa"),
           py::arg("format"), py::arg("tiles"), py::arg("rows"), py::arg("k"), py::arg("copies"), py::arg("threads"))
      .def("set_rows", &ProductBench::set_rows, py::arg("x"), py::arg("most_rows"),
           "x [m, k] float32 that the next passes multiply, at most most_rows of them at once.")
      .def("multiply", py::overload_cast<>(&ProductBench::multiply), "One pass: x times every copy, transposed.")
      .def("product", &ProductBench::product, py::arg("copy"), "The last pass's product with a copy: float32 [m, rows].")
      .def("read", &ProductBench::read, "One pass of plain reads over the copies; returns its bytes.");
}

const Binding binding("products", bind_products);

}  // namespace
}  // namespace edge
