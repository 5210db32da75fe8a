#include "kv/kv_pool.h"

#include <algorithm>
#include <cstring>

#include "kv/kv_cache.h"

namespace edge {
namespace {
constexpr int64_t kFlashPageTokens = 16;  // of f16; about the same bytes of other types
}  // namespace

KvShape KvPool::flash_shape(int64_t n_layers, int64_t kv_dim, KvType type, int64_t head_dim) {
  KvShape shape;
  shape.n_layers = n_layers;
  shape.kv_dim = kv_dim;
  shape.page_tokens = kFlashPageTokens << static_cast<int>(type);
  shape.type = type;
  shape.head_dim = head_dim;
  shape.padded = true;
  return shape;
}

uint64_t KvPool::bytes(const KvShape& shape, int64_t context_tokens, const KvOptions& options) {
  const int64_t n_pages = shape.pages_for(context_tokens);
  const uint64_t tails = round_up(static_cast<uint64_t>(options.n_tails) * shape.tail_bytes(), kReadAlign);
  if (!options.on_flash()) return tails + static_cast<uint64_t>(n_pages) * shape.page_bytes();
  return tails + static_cast<uint64_t>(options.resident_pages) * shape.page_bytes() +
         KvFlash::bytes(shape, n_pages, options.range_pages);
}

Result<std::unique_ptr<KvPool>> KvPool::create(const KvShape& shape, int64_t context_tokens, const KvOptions& options,
                                               Budget& budget) {
  auto pool = std::make_unique<KvPool>();
  pool->options_ = options;
  pool->context_tokens_ = context_tokens;
  pool->n_pages_left_ = shape.pages_for(context_tokens);
  EDGE_TRY(pool->reserve_frames(shape, options.on_flash() ? options.resident_pages : pool->n_pages_left_, budget));
  EDGE_TRY(pool->reserve_tails(budget));
  if (!options.on_flash()) return pool;
  const int64_t n_places = pool->n_pages_left_;
  for (int64_t place = n_places; place-- > 0;) pool->free_places_.push_back(static_cast<int32_t>(place));
  EDGE_ASSIGN(pool->flash_, KvFlash::create(shape, n_places, options.range_pages, options.scratch, budget));
  pool->stream_ = std::make_unique<KvStream>(*pool->flash_);
  return pool;
}

Status KvPool::reserve_frames(const KvShape& shape, int64_t n_frames, Budget& budget) {
  EDGE_ASSIGN(frames_, budget.reserve(static_cast<uint64_t>(n_frames) * shape.page_bytes(), "kv cache"));
  {
    std::lock_guard lock(mutex_);
    shape_ = shape;
  }
  n_frames_ = n_frames;
  users_.assign(static_cast<size_t>(n_frames), 0);
  free_frames_.clear();
  for (int64_t frame = n_frames; frame-- > 0;) free_frames_.push_back(static_cast<int32_t>(frame));
  return {};
}

Status KvPool::reserve_tails(Budget& budget) {
  if (n_tails() == 0) return {};
  EDGE_ASSIGN(tails_, budget.reserve(static_cast<uint64_t>(n_tails()) * shape_.tail_bytes(), "kv cache"));
  free_tails_.clear();
  for (auto frame = static_cast<int32_t>(n_tails()); frame-- > 0;) free_tails_.push_back(frame);
  return {};
}

int32_t KvPool::take_tail() {
  if (free_tails_.empty()) return -1;
  const int32_t frame = free_tails_.back();
  free_tails_.pop_back();
  return frame;
}

void KvPool::copy_tail(int32_t from, int32_t to) {
  std::memcpy(tail_rows(to, 0, kKeys), tail_rows(from, 0, kKeys), shape_.tail_bytes());
}

int64_t KvPool::page_tokens() const {
  std::lock_guard lock(mutex_);
  return shape_.page_tokens;
}

KvTraffic KvPool::traffic() const {
  std::lock_guard lock(mutex_);
  KvTraffic traffic = past_;
  if (flash_ != nullptr) {
    traffic.written_bytes += flash_->bytes_written();
    traffic.read_bytes += flash_->bytes_read();
  }
  if (stream_ != nullptr) traffic.wait_seconds += stream_->wait_seconds();
  return traffic;
}

bool KvPool::take() {
  if (n_pages_left_ == 0) return false;
  --n_pages_left_;
  return true;
}

void KvPool::give(const KvPage& page) {
  if (page.frame >= 0 && users_[static_cast<size_t>(page.frame)] > 0) {
    --users_[static_cast<size_t>(page.frame)];
    return;
  }
  ++n_pages_left_;
  if (page.frame >= 0) free_frames_.push_back(page.frame);
  if (page.place >= 0) free_places_.push_back(page.place);
}

bool KvPool::own(KvPage& shared) {
  int32_t& users = users_[static_cast<size_t>(shared.frame)];
  if (users == 0) return true;
  // Pages that are taken have frames by now, so one that is left has one as well.
  if (free_frames_.empty() || !take()) return false;
  const int32_t frame = free_frames_.back();
  free_frames_.pop_back();
  std::memcpy(page(frame), page(shared.frame), shape_.page_bytes());
  --users;
  shared.frame = frame;
  return true;
}

Status KvPool::hold(KvCache& cache, int64_t first) {
  std::vector<KvPage*> missing;
  for (size_t i = static_cast<size_t>(first); i < cache.pages_.size(); ++i) {
    if (cache.pages_[i].frame < 0) missing.push_back(&cache.pages_[i]);
  }
  const auto n_missing = static_cast<int64_t>(missing.size());
  if (n_missing > static_cast<int64_t>(free_frames_.size())) EDGE_TRY(make_room(cache, first, n_missing));
  EDGE_TRY(bring(missing));
  // What is written to now is no longer what the file holds.
  for (size_t i = static_cast<size_t>(first); i < cache.pages_.size(); ++i) {
    KvPage& page = cache.pages_[i];
    if (page.place >= 0) free_places_.push_back(page.place);
    page.place = -1;
  }
  if (flash_ == nullptr) return {};
  std::vector<KvPage*> back;
  for (int64_t i = first; i-- > 0 && back.size() < free_frames_.size();) {
    KvPage& page = cache.pages_[static_cast<size_t>(i)];
    if (page.frame < 0) back.push_back(&page);
  }
  std::reverse(back.begin(), back.end());
  return bring(back);
}

Status KvPool::make_room(KvCache& cache, int64_t first, int64_t n_frames) {
  const int64_t n_leaving = n_frames - static_cast<int64_t>(free_frames_.size());
  std::vector<KvPage*> leaving;
  const auto choose = [&](KvCache& from, int64_t n_pages) {
    for (int64_t i = 0; i < n_pages && static_cast<int64_t>(leaving.size()) < n_leaving; ++i) {
      KvPage& page = from.pages_[static_cast<size_t>(i)];
      if (page.frame >= 0) leaving.push_back(&page);
    }
  };
  for (KvCache* other : caches_) {
    // What a sequence has staged stays where it is.
    if (other != &cache && other->n_staged_ == 0) choose(*other, static_cast<int64_t>(other->pages_.size()));
  }
  choose(cache, first);
  if (flash_ == nullptr || static_cast<int64_t>(leaving.size()) < n_leaving) {
    return error(Code::kContextOverflow, "kv cache: the rows of one pass need %lld pages in memory, it has %lld",
                 static_cast<long long>(n_frames), static_cast<long long>(n_frames_));
  }
  EDGE_TRY(write_out(leaving));
  for (KvPage* leaver : leaving) {
    free_frames_.push_back(leaver->frame);
    leaver->frame = -1;
  }
  return {};
}

Status KvPool::write_out(std::span<KvPage* const> leaving) {
  std::vector<int32_t> places;
  std::vector<std::byte*> pages;
  std::vector<KvPage*> written;
  for (KvPage* leaver : leaving) {
    if (leaver->place >= 0) continue;
    // There is a place for every page of the context.
    places.push_back(free_places_.back());
    free_places_.pop_back();
    pages.push_back(page(leaver->frame));
    written.push_back(leaver);
  }
  const Status status = flash_->write(places, pages);
  if (!status.ok()) {
    free_places_.insert(free_places_.end(), places.rbegin(), places.rend());
    return status;
  }
  for (size_t i = 0; i < written.size(); ++i) written[i]->place = places[i];
  return {};
}

Status KvPool::bring(std::span<KvPage* const> brought) {
  std::vector<int32_t> places;
  std::vector<std::byte*> pages;
  for (size_t i = 0; i < brought.size(); ++i) {
    if (brought[i]->place < 0) continue;
    places.push_back(brought[i]->place);
    pages.push_back(page(free_frames_[free_frames_.size() - 1 - i]));
  }
  if (!places.empty()) EDGE_TRY(flash_->read(places, pages));
  for (KvPage* one : brought) {
    one->frame = free_frames_.back();
    free_frames_.pop_back();
  }
  return {};
}

}  // namespace edge
