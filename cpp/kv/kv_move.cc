// Pages of a pool from one way of keeping them to another: everything goes through the file, so that old and new memory
// are never held together.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kv/kv_cache.h"

namespace edge {
namespace {

// Keys (or values) of one page, without what pads them.
uint64_t page_half_bytes(const KvShape& shape) {
  return shape.group_bytes() * static_cast<uint64_t>(shape.page_tokens / kKvTileTokens);
}

}  // namespace

bool KvPool::is_settled(const KvOptions& options) const {
  if (parked_ || options.on_flash() != options_.on_flash()) return false;
  if (shape_.has_tail() && options.n_tails != options_.n_tails) return false;
  return !options.on_flash() ||
         (options.resident_pages == options_.resident_pages && options.range_pages == options_.range_pages);
}

Status KvPool::park(const KvShape& flash_shape, const KvOptions& options, Budget& budget) {
  if (parked_) return {};
  for (KvCache* cache : caches_) {
    cache->rollback();
    cache->forget_tail();
  }
  if (flash_ != nullptr) {
    std::vector<KvPage*> held;
    for (KvCache* cache : caches_) {
      for (KvPage& page : cache->pages_) {
        if (page.frame >= 0) held.push_back(&page);
      }
    }
    EDGE_TRY(write_out(held));
    for (KvPage* page : held) page->frame = -1;
  } else {
    const int64_t n_places = flash_shape.pages_for(context_tokens_);
    int64_t n_taken = 0;
    for (const KvCache* cache : caches_) n_taken += flash_shape.pages_for(cache->n_committed());
    if (n_taken > n_places) {
      return error(Code::kUnsupported, "kv cache: expected at most %lld pages that go to a drive, found %lld: texts share some",
                   static_cast<long long>(n_places), static_cast<long long>(n_taken));
    }
    EDGE_ASSIGN(auto flash, KvFlash::create(flash_shape, n_places, options.range_pages, options.scratch, budget));
    int32_t place = 0;
    for (KvCache* cache : caches_) {
      EDGE_TRY(write_rows(*cache, *flash, place));
      place += static_cast<int32_t>(flash_shape.pages_for(cache->n_committed()));
    }
    place = 0;
    for (KvCache* cache : caches_) {
      cache->pages_.assign(static_cast<size_t>(flash_shape.pages_for(cache->n_committed())), {});
      for (KvPage& page : cache->pages_) page.place = place++;
    }
    n_pages_left_ = n_places - place;
    free_places_.clear();
    for (auto free = static_cast<int32_t>(n_places); free-- > place;) free_places_.push_back(free);
    std::lock_guard lock(mutex_);
    shape_ = flash_shape;
    flash_ = std::move(flash);
  }
  tails_.release();
  free_tails_.clear();
  frames_.release();
  free_frames_.clear();
  n_frames_ = 0;
  parked_ = true;
  return {};
}

Status KvPool::settle(const KvShape& shape, const KvOptions& options, Budget& budget) {
  if (!parked_) return {};
  if (options.on_flash()) {
    EDGE_TRY(flash_->set_ranges(options.range_pages, budget));
    EDGE_TRY(reserve_frames(shape, options.resident_pages, budget));
    std::lock_guard lock(mutex_);
    if (stream_ == nullptr) stream_ = std::make_unique<KvStream>(*flash_);
  } else {
    if (flash_->range_pages() == 0) EDGE_TRY(flash_->set_ranges(1, budget));
    const int64_t n_pages = shape.pages_for(context_tokens_);
    EDGE_TRY(reserve_frames(shape, n_pages, budget));
    n_pages_left_ = n_pages;
    free_places_.clear();
    for (KvCache* cache : caches_) {
      const std::vector<KvPage> places = std::move(cache->pages_);
      const auto n_own = static_cast<size_t>(shape.pages_for(cache->n_committed()));
      // Larger pages: several short texts may need more of them than there are.
      if (n_own > free_frames_.size()) cache->n_committed_ = 0;
      cache->pages_.assign(cache->n_committed_ > 0 ? n_own : 0, {});
      for (KvPage& page : cache->pages_) {
        page.frame = free_frames_.back();
        free_frames_.pop_back();
        --n_pages_left_;
      }
      // What cannot be read is computed again.
      if (!read_rows(*cache, places).ok()) cache->truncate(0);
    }
    forget_flash();
  }
  options_ = options;
  EDGE_TRY(reserve_tails(budget));
  parked_ = false;
  return {};
}

void KvPool::forget_flash() {
  const KvTraffic all = traffic();
  std::lock_guard lock(mutex_);
  past_ = all;
  stream_.reset();
  flash_.reset();
}

Status KvPool::write_rows(KvCache& cache, KvFlash& flash, int32_t first_place) {
  const KvShape& to = flash.shape();
  const int64_t n_pages = to.pages_for(cache.n_committed()), n_most = KvFlash::kBuffers * flash.range_pages();
  for (int64_t layer = 0; layer < to.n_layers; ++layer) {
    for (const KvHalf half : {kKeys, kValues}) {
      for (int64_t begin = 0; begin < n_pages; begin += n_most) {
        const int64_t n = std::min(n_most, n_pages - begin);
        for (int64_t page = begin; page < begin + n; ++page) {
          // A page of the file lies within one of memory.
          std::memcpy(flash.buffer(0) + static_cast<uint64_t>(page - begin) * to.half_bytes(),
                      cache.group(layer, half, page * to.page_tokens), page_half_bytes(to));
        }
        EDGE_TRY(flash.write_halves(first_place + static_cast<int32_t>(begin), n, layer, half, flash.buffer(0)));
      }
    }
  }
  return {};
}

Status KvPool::read_rows(KvCache& cache, std::span<const KvPage> from) {
  const KvShape& shape = flash_->shape();
  const int64_t n_pages = shape.pages_for(cache.n_committed()), n_most = KvFlash::kBuffers * flash_->range_pages();
  for (int64_t layer = 0; layer < shape.n_layers; ++layer) {
    for (const KvHalf half : {kKeys, kValues}) {
      for (int64_t begin = 0; begin < n_pages; begin += n_most) {
        const std::span<const KvPage> pages =
            from.subspan(static_cast<size_t>(begin), static_cast<size_t>(std::min(n_most, n_pages - begin)));
        std::vector<ReadRequest> requests;
        std::byte* into = flash_->buffer(0);
        for (const KvPage& page : pages) {
          requests.push_back({flash_->offset(layer, half, page.place), shape.half_bytes(), into, 0});
          into += shape.half_bytes();
        }
        EDGE_TRY(flash_->reader().read_all(requests));
        for (size_t i = 0; i < pages.size(); ++i) {
          const std::byte* const data = flash_->buffer(0) + i * shape.half_bytes();
          EDGE_TRY(flash_->check(layer, half, pages[i].place, data));
          const int64_t page = begin + static_cast<int64_t>(i);
          std::memcpy(cache.group(layer, half, page * shape.page_tokens), data, page_half_bytes(shape));
        }
      }
    }
  }
  return {};
}

}  // namespace edge
