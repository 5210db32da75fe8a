// The keys and values of one pass, range by range in the order attention needs them. What lies in the file is read ahead,
// past the end of one layer into the next, while earlier ranges are computed on.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "core/status.h"
#include "core/thread_pool.h"
#include "kv/kv_flash.h"
#include "kv/kv_shape.h"

namespace edge {

// Committed slots [begin, end) of one layer's keys or values.
struct KvRange {
  int64_t layer = 0;
  KvHalf half = kKeys;
  int64_t begin = 0;
  int64_t end = 0;
  // [page_tokens][kv_dim] of every page, from the one that holds `begin`, half_bytes apart; null when they are in frames.
  const std::byte* data = nullptr;
};

class KvStream {
 public:
  explicit KvStream(KvFlash& flash) : flash_(flash) {}
  ~KvStream() { stop(); }

  // A pass over `n_committed` slots: for every layer, `repeats` times, its keys and then its values from slot
  // first_slots[layer] on. `pages` must stay as they are until stop() or the last range.
  void start(std::span<const KvPage> pages, int64_t n_committed, std::vector<int64_t> first_slots, int64_t repeats);
  // The next range; the previous one's bytes are gone. kDiskError, kCorrupt; the pass must then be stopped.
  Result<KvRange> next(ThreadPool& pool);
  // Nothing is in flight afterwards.
  void stop();

  int64_t range_tokens() const { return flash_.range_pages() * flash_.shape().page_tokens; }
  // From any thread.
  double wait_seconds() const { return wait_seconds_.load(std::memory_order_relaxed); }

 private:
  // Where in the pass; `page` is the first of the next range.
  struct Cursor {
    size_t layer = 0;
    int64_t repeat = 0;
    KvHalf half = kKeys;
    int64_t page = -1;  // -1: the first of this layer
  };
  struct Flight {
    KvRange range;
    int buffer = 0;
    int n_flying = 0;
    Status status;
  };

  // False at the end of the pass.
  bool advance(Cursor* cursor, KvRange* range) const;
  void read_ahead();
  void submit(Flight* flight);
  Status wait_for(const Flight& flight);
  Status check(const Flight& flight, ThreadPool& pool) const;

  KvFlash& flash_;
  std::span<const KvPage> pages_;
  int64_t n_committed_ = 0;
  std::vector<int64_t> first_slots_;
  int64_t repeats_ = 0;
  Cursor shown_;  // of next()
  Cursor ahead_;  // of the reads
  bool all_submitted_ = true;
  std::deque<Flight> flights_;  // ranges in the file, in order; the first may be the one that was shown
  bool front_shown_ = false;
  std::vector<int> free_buffers_;
  int n_flying_ = 0;
  Status broken_;  // the reader itself failed: buffers may still be written to
  std::atomic<double> wait_seconds_{0};  // a figure: nothing is ordered by it
};

}  // namespace edge
