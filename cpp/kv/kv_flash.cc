#include "kv/kv_flash.h"

#include <vector>

#include "io/xxh3.h"

namespace edge {
namespace {

// Calls fn(begin, n) for every run of places that follow each other.
template <typename Fn>
Status for_runs(std::span<const int32_t> places, Fn&& fn) {
  for (size_t begin = 0; begin < places.size();) {
    size_t n = 1;
    while (begin + n < places.size() && places[begin + n] == places[begin] + static_cast<int32_t>(n)) ++n;
    EDGE_TRY(fn(begin, n));
    begin += n;
  }
  return {};
}

uint64_t hash_bytes(const KvShape& shape, int64_t n_places) {
  return static_cast<uint64_t>(shape.n_layers * 2 * n_places) * sizeof(uint64_t);
}

}  // namespace

uint64_t KvFlash::bytes(const KvShape& shape, int64_t n_places, int64_t range_pages) {
  return round_up(hash_bytes(shape, n_places), kReadAlign) +
         static_cast<uint64_t>(kBuffers * range_pages) * shape.half_bytes();
}

Result<std::unique_ptr<KvFlash>> KvFlash::create(const KvShape& shape, int64_t n_places, int64_t range_pages,
                                                 const ScratchOptions& options, Budget& budget) {
  auto flash = std::make_unique<KvFlash>();
  flash->shape_ = shape;
  flash->n_places_ = n_places;
  EDGE_ASSIGN(flash->hashes_, budget.reserve(hash_bytes(shape, n_places), "kv cache"));
  EDGE_TRY(flash->set_ranges(range_pages, budget));
  const uint64_t file_bytes = static_cast<uint64_t>(n_places) * shape.page_bytes();
  EDGE_ASSIGN(flash->file_, ScratchFile::create(options, file_bytes));
  return flash;
}

Status KvFlash::set_ranges(int64_t range_pages, Budget& budget) {
  buffers_.release();
  range_pages_ = 0;
  EDGE_ASSIGN(buffers_, budget.reserve(static_cast<uint64_t>(kBuffers * range_pages) * shape_.half_bytes(), "kv cache"));
  range_pages_ = range_pages;
  return {};
}

Status KvFlash::write_halves(int32_t first_place, int64_t n, int64_t layer, KvHalf half, const std::byte* data) {
  const std::span<const std::byte> all(data, static_cast<uint64_t>(n) * shape_.half_bytes());
  for (int32_t i = 0; i < n; ++i) {
    hash(layer, half, first_place + i) = xxh3(all.subspan(static_cast<uint64_t>(i) * shape_.half_bytes(), shape_.half_bytes()));
  }
  return file_->write(offset(layer, half, first_place), {&all, 1});
}

Status KvFlash::write(std::span<const int32_t> places, std::span<std::byte* const> pages) {
  const uint64_t half_bytes = shape_.half_bytes();
  return for_runs(places, [&](size_t begin, size_t n) -> Status {
    std::vector<std::span<const std::byte>> pieces(n);
    for (int64_t layer = 0; layer < shape_.n_layers; ++layer) {
      for (const KvHalf half : {kKeys, kValues}) {
        for (size_t i = 0; i < n; ++i) {
          pieces[i] = {pages[begin + i] + static_cast<uint64_t>(layer * 2 + half) * half_bytes, half_bytes};
          hash(layer, half, places[begin + i]) = xxh3(pieces[i]);
        }
        EDGE_TRY(file_->write(offset(layer, half, places[begin]), pieces));
      }
    }
    return {};
  });
}

Status KvFlash::read(std::span<const int32_t> places, std::span<std::byte* const> pages) {
  std::vector<ReadRequest> requests;
  for (size_t i = 0; i < places.size(); ++i) {
    for (int64_t layer = 0; layer < shape_.n_layers; ++layer) {
      for (const KvHalf half : {kKeys, kValues}) {
        std::byte* const into = pages[i] + static_cast<uint64_t>(layer * 2 + half) * shape_.half_bytes();
        requests.push_back({offset(layer, half, places[i]), shape_.half_bytes(), into, 0});
      }
    }
  }
  EDGE_TRY(reader().read_all(requests));
  for (size_t i = 0; i < places.size(); ++i) {
    for (int64_t layer = 0; layer < shape_.n_layers; ++layer) {
      for (const KvHalf half : {kKeys, kValues}) {
        EDGE_TRY(check(layer, half, places[i],
                       pages[i] + static_cast<uint64_t>(layer * 2 + half) * shape_.half_bytes()));
      }
    }
  }
  return {};
}

Status KvFlash::read_half(int32_t place, int64_t layer, KvHalf half, std::byte* into) {
  const ReadRequest request{offset(layer, half, place), shape_.half_bytes(), into, 0};
  EDGE_TRY(reader().read_all({&request, 1}));
  return check(layer, half, place, into);
}

Status KvFlash::check(int64_t layer, KvHalf half, int32_t place, const std::byte* data) const {
  const uint64_t expected = hash(layer, half, place);
  const uint64_t found = xxh3({data, shape_.half_bytes()});
  if (found == expected) return {};
  return error(Code::kCorrupt, "kv cache: %s of layer %lld on the drive are damaged: expected hash %016llx, found %016llx",
               half == kKeys ? "keys" : "values", static_cast<long long>(layer),
               static_cast<unsigned long long>(expected), static_cast<unsigned long long>(found));
}

}  // namespace edge
