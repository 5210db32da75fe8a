#include "model/linear.h"

#include <algorithm>
#include <array>

namespace edge {
namespace {
constexpr size_t kMaxProducts = 4;
// Pieces per thread in one pass: enough that a slower core does not hold the others up, few enough to keep reads long.
constexpr int64_t kPiecesPerThread = 8;
// Less than this is done before another core has noticed.
constexpr int64_t kPieceBytes = 32 << 10;
}  // namespace

uint64_t ActRows::bytes(int64_t max_rows, int64_t max_k) {
  const int64_t row = std::max(act_row_bytes(ActKind::kQ8x32, max_k), act_row_bytes(ActKind::kQ8x256, max_k));
  return static_cast<uint64_t>(max_rows * row);
}

void ActRows::set(const float* x, int64_t x_stride, int64_t n_rows, int64_t k) {
  x_ = x;
  x_stride_ = x_stride;
  n_rows_ = n_rows;
  k_ = k;
  made_ = ActKind::kF32;
}

const std::byte* ActRows::rows(ActKind kind, int64_t* stride_bytes) {
  if (kind == ActKind::kF32) {
    *stride_bytes = x_stride_ * static_cast<int64_t>(sizeof(float));
    return reinterpret_cast<const std::byte*>(x_);
  }
  *stride_bytes = act_row_bytes(kind, k_);
  if (made_ != kind) {
    const int64_t stride = *stride_bytes;
    pool_.parallel(n_rows_, row_grain(k_), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        std::byte* out = quantised_.data() + row * stride;
        if (kind == ActKind::kQ8x32) {
          kernels_.quantize_q8x32(x_ + row * x_stride_, k_, reinterpret_cast<ActQ8x32*>(out));
        } else {
          kernels_.quantize_q8x256(x_ + row * x_stride_, k_, reinterpret_cast<ActQ8x256*>(out));
        }
      }
    });
    made_ = kind;
  }
  return quantised_.data();
}

Result<const float*> Linear::vector(WeightId weight) {
  if (weight == kNoWeight) return static_cast<const float*>(nullptr);
  EDGE_ASSIGN(Lease lease, store_.acquire(weight, {}));
  return reinterpret_cast<const float*>(lease.data());
}

void Linear::run_pieces(std::span<const Piece> pieces, const std::byte* acts, int64_t stride_bytes, int64_t n_rows) {
  int64_t n_tiles = 0;
  for (const Piece& piece : pieces) n_tiles += piece.end - piece.first;
  const PackEntry& first = *pieces[0].entry;
  // A further row is multiplied with weights that are decoded already: a third of the first.
  const int64_t work_bytes = tile_stride_bytes(first.format, first.cols) * n_tiles * (n_rows + 2) / 3;
  const int64_t n_shares = std::clamp<int64_t>(work_bytes / kPieceBytes, 1, pool_.size() * kPiecesPerThread);
  const int64_t grain = (n_tiles + n_shares - 1) / n_shares;
  pool_.parallel(n_tiles, grain, [&](int64_t begin, int64_t end, int) {
    int64_t before = 0;
    for (const Piece& piece : pieces) {
      const int64_t low = std::max(begin - before, int64_t{0}) + piece.first;
      const int64_t high = std::min(end - before + piece.first, piece.end);
      before += piece.end - piece.first;
      if (low >= high) continue;
      const PackEntry& entry = *piece.entry;
      kernels_.gemv[static_cast<uint32_t>(entry.format)](piece.lease.data(), entry.cols, acts, stride_bytes, n_rows,
                                                          piece.product->y, piece.product->y_stride, low, high);
    }
  });
}

Status Linear::run(ActRows& x, std::span<const Product> products) {
  if (products.size() > kMaxProducts) return error(Code::kBadArgument, "linear: at most %zu products", kMaxProducts);
  bool one_kind = true;
  const ActKind kind = act_kind(directory_.entry(products[0].weight).format);
  for (const Product& product : products) {
    one_kind = one_kind && act_kind(directory_.entry(product.weight).format) == kind;
  }
  // Weights of different activation kinds take turns: the buffer holds one quantised copy at a time.
  if (!one_kind) {
    for (const Product& product : products) EDGE_TRY(run(x, {&product, 1}));
    return {};
  }
  int64_t stride_bytes = 0;
  const std::byte* acts = x.rows(kind, &stride_bytes);
  const auto multiply = [&](std::span<const Piece> pieces) {
    run_pieces(pieces, acts, stride_bytes, x.n_rows());
  };
  // Weights that come whole are multiplied together; one that comes in parts, part by part.
  std::array<Piece, kMaxProducts> pieces;
  for (size_t i = 0, n = 0; i < products.size(); ++i) {
    const PackEntry& entry = directory_.entry(products[i].weight);
    const int64_t n_tiles = tile_count(entry.rows);
    for (int64_t first = 0; first < n_tiles;) {
      EDGE_ASSIGN(TileLease tiles, store_.acquire_tiles(products[i].weight, first));
      const int64_t end = std::min(tiles.end_tile, n_tiles);
      pieces[n++] = {&products[i], &entry, std::move(tiles.lease), first, end};
      const bool in_parts = first > 0 || end < n_tiles;
      if (in_parts || i + 1 == products.size()) {
        multiply({pieces.data(), n});
        for (; n > 0; --n) pieces[n - 1].lease.reset();
      }
      first = end;
    }
  }
  for (const Product& product : products) {
    EDGE_ASSIGN(const float* bias, vector(product.bias));
    if (bias == nullptr) continue;
    for (int64_t row = 0; row < x.n_rows(); ++row) {
      kernels_.add(bias, directory_.entry(product.weight).rows, product.y + row * product.y_stride);
    }
  }
  return {};
}

}  // namespace edge
