// Pages of keys and values in a file: written when memory runs short, read back layer by layer, hashed on both ways.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "core/budget.h"
#include "core/status.h"
#include "io/scratch_file.h"
#include "kv/kv_shape.h"

namespace edge {

// The file is [layer][keys, values][place][half_bytes]: a layer's keys of pages that follow each other are one long read.
class KvFlash {
 public:
  // Buffers that ranges are read into: one in use, the others on their way.
  static constexpr int kBuffers = 4;

  // Memory it takes from the budget while there are buffers.
  static uint64_t bytes(const KvShape& shape, int64_t n_places, int64_t range_pages);
  static Result<std::unique_ptr<KvFlash>> create(const KvShape& shape, int64_t n_places, int64_t range_pages,
                                                 const ScratchOptions& options, Budget& budget);

  // Buffers of another size; after an error there are none. Nothing may be in flight.
  Status set_ranges(int64_t range_pages, Budget& budget);

  const KvShape& shape() const { return shape_; }
  int64_t range_pages() const { return range_pages_; }
  BlockReader& reader() { return file_->reader(); }
  uint64_t bytes_written() const { return file_->bytes_written(); }
  uint64_t bytes_read() const { return file_->reader().bytes_read(); }

  // Whole pages, memory [n_layers][2][half_bytes] each. Nothing else may be in flight.
  Status write(std::span<const int32_t> places, std::span<std::byte* const> pages);
  Status read(std::span<const int32_t> places, std::span<std::byte* const> pages);
  // One half of places that follow each other, from `data` [n][half_bytes].
  Status write_halves(int32_t first_place, int64_t n, int64_t layer, KvHalf half, const std::byte* data);
  // One half of one page into `into` [half_bytes].
  Status read_half(int32_t place, int64_t layer, KvHalf half, std::byte* into);

  std::byte* buffer(int index) { return buffers_.data() + static_cast<uint64_t>(index) * buffer_bytes(); }
  uint64_t offset(int64_t layer, KvHalf half, int32_t place) const {
    return (static_cast<uint64_t>((layer * 2 + half) * n_places_) + static_cast<uint64_t>(place)) * shape_.half_bytes();
  }
  // kCorrupt when the bytes are not those that were written.
  Status check(int64_t layer, KvHalf half, int32_t place, const std::byte* data) const;

 private:
  uint64_t buffer_bytes() const { return static_cast<uint64_t>(range_pages_) * shape_.half_bytes(); }
  uint64_t& hash(int64_t layer, KvHalf half, int32_t place) const {
    return hashes_.as<uint64_t>()[(layer * 2 + half) * n_places_ + place];
  }

  KvShape shape_;
  int64_t n_places_ = 0;
  int64_t range_pages_ = 0;
  Block hashes_;  // [layer][2][place]
  Block buffers_;
  std::unique_ptr<ScratchFile> file_;
};

}  // namespace edge
