// Matrix products of activation rows with leased weights: quantise the rows once, share one pass over the threads.
#pragma once

#include <span>

#include "core/budget.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "store/weight_store.h"

namespace edge {

inline int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }

// Activation rows and, made on demand, the quantised copies that weight formats multiply with.
class ActRows {
 public:
  // quantised must hold bytes(max_rows, max_k).
  ActRows(const Kernels& kernels, ThreadPool& pool, std::span<std::byte> quantised)
      : kernels_(kernels), pool_(pool), quantised_(quantised) {}
  static uint64_t bytes(int64_t max_rows, int64_t max_k);

  // Rows x[n_rows][k], x_stride floats apart.
  void set(const float* x, int64_t x_stride, int64_t n_rows, int64_t k);
  const std::byte* rows(ActKind kind, int64_t* stride_bytes);
  int64_t n_rows() const { return n_rows_; }
  int64_t k() const { return k_; }

 private:
  const Kernels& kernels_;
  ThreadPool& pool_;
  std::span<std::byte> quantised_;
  const float* x_ = nullptr;
  int64_t x_stride_ = 0;
  int64_t n_rows_ = 0;
  int64_t k_ = 0;
  ActKind made_ = ActKind::kF32;  // which quantised copy is in the buffer
};

struct Product {
  WeightId weight;
  float* y;          // [n_rows][pad16(weight rows)]
  int64_t y_stride;  // floats
  WeightId bias = kNoWeight;
};

class Linear {
 public:
  Linear(WeightStore& store, const PackDirectory& directory, const Kernels& kernels, ThreadPool& pool)
      : store_(store), directory_(directory), kernels_(kernels), pool_(pool) {}

  // y = W x (+ bias) for every product; all read the same rows, and weights that come whole are leased together.
  Status run(ActRows& x, std::span<const Product> products);
  // A vector weight in f32, or null for kNoWeight. Vectors are always resident, so the pointer outlives the lease.
  Result<const float*> vector(WeightId weight);

 private:
  // Tiles of one product's weight that are here.
  struct Piece {
    const Product* product = nullptr;
    const PackEntry* entry = nullptr;
    Lease lease;
    int64_t first = 0, end = 0;
  };
  // One pass of the threads over all pieces.
  void run_pieces(std::span<const Piece> pieces, const std::byte* acts, int64_t stride_bytes, int64_t n_rows);

  WeightStore& store_;
  const PackDirectory& directory_;
  const Kernels& kernels_;
  ThreadPool& pool_;
};

}  // namespace edge
