#include "kv/kv_stream.h"

#include <algorithm>
#include <chrono>
#include <mutex>

namespace edge {

void KvStream::start(std::span<const KvPage> pages, int64_t n_committed, std::vector<int64_t> first_slots,
                     int64_t repeats) {
  stop();
  pages_ = pages;
  n_committed_ = n_committed;
  first_slots_ = std::move(first_slots);
  repeats_ = repeats;
  shown_ = ahead_ = Cursor{};
  all_submitted_ = false;
  free_buffers_.clear();
  for (int buffer = KvFlash::kBuffers; buffer-- > 0;) free_buffers_.push_back(buffer);
  if (broken_.ok()) read_ahead();
}

bool KvStream::advance(Cursor* cursor, KvRange* range) const {
  const KvShape& shape = flash_.shape();
  const int64_t n_pages = shape.pages_for(n_committed_);
  for (; cursor->layer < first_slots_.size();) {
    const int64_t first = first_slots_[cursor->layer];
    if (cursor->page < 0) cursor->page = first < n_committed_ ? first / shape.page_tokens : n_pages;
    if (cursor->page < n_pages) {
      const auto in_file = [&](int64_t page) { return pages_[static_cast<size_t>(page)].frame < 0; };
      const bool kind = in_file(cursor->page);
      int64_t end = cursor->page + 1;
      while (end < n_pages && end - cursor->page < flash_.range_pages() && in_file(end) == kind) ++end;
      range->layer = static_cast<int64_t>(cursor->layer);
      range->half = cursor->half;
      range->begin = std::max(first, cursor->page * shape.page_tokens);
      range->end = std::min(n_committed_, end * shape.page_tokens);
      cursor->page = end;
      return true;
    }
    cursor->page = -1;
    if (cursor->half == kKeys) {
      cursor->half = kValues;
    } else {
      cursor->half = kKeys;
      if (++cursor->repeat == repeats_) {
        cursor->repeat = 0;
        ++cursor->layer;
      }
    }
  }
  return false;
}

void KvStream::read_ahead() {
  while (!all_submitted_ && !free_buffers_.empty()) {
    KvRange range;
    if (!advance(&ahead_, &range)) {
      all_submitted_ = true;
      return;
    }
    if (pages_[static_cast<size_t>(range.begin / flash_.shape().page_tokens)].frame >= 0) continue;
    Flight flight;
    flight.range = range;
    flight.buffer = free_buffers_.back();
    flight.range.data = flash_.buffer(flight.buffer);
    free_buffers_.pop_back();
    flights_.push_back(std::move(flight));
    submit(&flights_.back());
  }
}

void KvStream::submit(Flight* flight) {
  const KvShape& shape = flash_.shape();
  const KvRange& range = flight->range;
  const int64_t page_end = shape.pages_for(range.end);
  std::byte* into = flash_.buffer(flight->buffer);
  for (int64_t page = range.begin / shape.page_tokens; page < page_end && flight->status.ok();) {
    const int32_t place = pages_[static_cast<size_t>(page)].place;
    int64_t n = 1;
    while (page + n < page_end && pages_[static_cast<size_t>(page + n)].place == place + n) ++n;
    const uint64_t bytes = static_cast<uint64_t>(n) * shape.half_bytes();
    flight->status = flash_.reader().submit(
        {flash_.offset(range.layer, range.half, place), bytes, into, static_cast<uint64_t>(flight->buffer)});
    if (!flight->status.ok()) return;
    ++flight->n_flying;
    ++n_flying_;
    into += bytes;
    page += n;
  }
}

Status KvStream::wait_for(const Flight& flight) {
  if (flight.n_flying == 0) return {};
  const auto start = std::chrono::steady_clock::now();
  while (flight.n_flying > 0) {
    Result<ReadCompletion> completion = flash_.reader().wait();
    if (!completion.ok()) return broken_ = completion.status();
    for (Flight& other : flights_) {
      if (static_cast<uint64_t>(other.buffer) != completion->tag) continue;
      --other.n_flying;
      if (other.status.ok()) other.status = std::move(completion->status);
    }
    --n_flying_;
  }
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
  wait_seconds_.fetch_add(waited.count(), std::memory_order_relaxed);
  return {};
}

Status KvStream::check(const Flight& flight, ThreadPool& pool) const {
  const KvShape& shape = flash_.shape();
  const KvRange& range = flight.range;
  const int64_t first = range.begin / shape.page_tokens;
  std::mutex mutex;
  Status status;
  pool.parallel(shape.pages_for(range.end) - first, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      Status found = flash_.check(range.layer, range.half, pages_[static_cast<size_t>(first + i)].place,
                                  range.data + static_cast<uint64_t>(i) * shape.half_bytes());
      if (found.ok()) continue;
      std::lock_guard lock(mutex);
      status = std::move(found);
    }
  });
  return status;
}

Result<KvRange> KvStream::next(ThreadPool& pool) {
  EDGE_TRY(Status(broken_));
  if (front_shown_) {
    free_buffers_.push_back(flights_.front().buffer);
    flights_.pop_front();
    front_shown_ = false;
  }
  read_ahead();
  KvRange range;
  if (!advance(&shown_, &range)) return error(Code::kBadArgument, "kv stream: the pass has no further range");
  if (pages_[static_cast<size_t>(range.begin / flash_.shape().page_tokens)].frame >= 0) return range;
  // The reads run at least as far ahead: this range is the first of them.
  const Flight& flight = flights_.front();
  EDGE_TRY(wait_for(flight));
  EDGE_TRY(Status(flight.status));
  EDGE_TRY(check(flight, pool));
  front_shown_ = true;
  return flight.range;
}

void KvStream::stop() {
  while (n_flying_ > 0 && broken_.ok()) {
    Result<ReadCompletion> completion = flash_.reader().wait();
    if (completion.ok()) --n_flying_;
    else broken_ = completion.status();
  }
  flights_.clear();
  front_shown_ = false;
  all_submitted_ = true;
  pages_ = {};
  first_slots_.clear();
}

}  // namespace edge
