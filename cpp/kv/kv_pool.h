// The pages of an engine's sequences: in memory all of them, or as many as there are frames, the others in a file.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "core/budget.h"
#include "core/status.h"
#include "kv/kv_flash.h"
#include "kv/kv_shape.h"
#include "kv/kv_stream.h"

namespace edge {

class KvCache;

// Where pages live. With resident_pages 0 all are in memory and nothing else here counts.
struct KvOptions {
  int64_t resident_pages = 0;
  int64_t range_pages = 1;  // pages of one read of one layer's keys or values
  int64_t n_tails = 0;      // blocks of KvShape::kTailTokens, where the shape has a tail
  ScratchOptions scratch;

  bool on_flash() const { return resident_pages > 0; }
};

struct KvTraffic {
  uint64_t written_bytes = 0;
  uint64_t read_bytes = 0;
  double wait_seconds = 0;  // attention stood waiting for the drive
};

class KvPool {
 public:
  // The shape of pages that go to a drive: small, since the one being written stays in memory, and padded.
  static KvShape flash_shape(int64_t n_layers, int64_t kv_dim, KvType type = KvType::kF16, int64_t head_dim = 0);
  // What create() takes from the budget.
  static uint64_t bytes(const KvShape& shape, int64_t context_tokens, const KvOptions& options);
  // Everything is reserved at once, so that a context that was accepted can always be filled.
  static Result<std::unique_ptr<KvPool>> create(const KvShape& shape, int64_t context_tokens, const KvOptions& options,
                                                Budget& budget);

  // Other pages in memory, in two steps, so that what they take together is never held at once. Nothing may be staged.
  // park() leaves all pages in a file and gives their memory back; on error nothing has changed. settle() reserves memory
  // anew and brings back what belongs there. Keys and values that a failing drive does not give back are forgotten: their
  // sequences hold fewer tokens then.
  Status park(const KvShape& flash_shape, const KvOptions& options, Budget& budget);
  Status settle(const KvShape& shape, const KvOptions& options, Budget& budget);
  // Whether pages are where these options want them.
  bool is_settled(const KvOptions& options) const;

  const KvShape& shape() const { return shape_; }
  // Of its shape. From any thread.
  int64_t page_tokens() const;
  // Since the pool was made. From any thread.
  KvTraffic traffic() const;
  KvFlash* flash() { return flash_.get(); }
  // Pages of the context that no sequence has.
  int64_t n_pages_left() const { return n_pages_left_; }
  // Null where all pages are in memory.
  KvStream* stream() { return stream_.get(); }

  // One layer's keys (or values) in one frame; f16: [token_in_page][kv_dim].
  std::byte* half(int32_t frame, int64_t layer, KvHalf half) {
    return page(frame) + static_cast<uint64_t>(layer * 2 + half) * shape_.half_bytes();
  }
  uint16_t* rows(int32_t frame, int64_t layer, KvHalf half) {
    return reinterpret_cast<uint16_t*>(this->half(frame, layer, half));
  }

  // [token_in_block][kv_dim] of one layer's keys (or values) in one frame of the tail, f16.
  uint16_t* tail_rows(int32_t frame, int64_t layer, KvHalf half) {
    return tails_.as<uint16_t>() +
           ((frame * shape_.n_layers + layer) * 2 + half) * KvShape::kTailTokens * shape_.kv_dim;
  }
  int64_t n_tails() const { return shape_.has_tail() ? options_.n_tails : 0; }

 private:
  friend class KvCache;
  Status reserve_tails(Budget& budget);
  int32_t take_tail();  // -1: all are taken
  void give_tail(int32_t frame) { free_tails_.push_back(frame); }
  void copy_tail(int32_t from, int32_t to);
  Status reserve_frames(const KvShape& shape, int64_t n_frames, Budget& budget);
  // Committed rows of a sequence, from its frames to places of `flash` that follow each other; and from the places of
  // `from`, which has another shape, to frames.
  Status write_rows(KvCache& cache, KvFlash& flash, int32_t first_place);
  Status read_rows(KvCache& cache, std::span<const KvPage> from);
  std::byte* page(int32_t frame) { return frames_.data() + static_cast<uint64_t>(frame) * shape_.page_bytes(); }
  int64_t n_frames() const { return n_frames_; }

  // One more page of the context; false when all are taken.
  bool take();
  void give(const KvPage& page);
  // A page in memory may be several caches'. Before one writes to it, it takes a copy; false when no page is left.
  void add_user(const KvPage& page) { ++users_[static_cast<size_t>(page.frame)]; }
  bool own(KvPage& page);
  // Puts the pages from `first` on into memory, to be written to. Other pages make room: idle sequences' first, then the
  // oldest of this one; a page goes to the file once. What room is left over takes back the latest pages.
  // On error no page is lost.
  Status hold(KvCache& cache, int64_t first);
  Status make_room(KvCache& cache, int64_t first, int64_t n_frames);
  // Gives the pages frames and their contents, those in the file from there.
  Status bring(std::span<KvPage* const> pages);

  // Gives these pages places and writes them there.
  Status write_out(std::span<KvPage* const> pages);
  void forget_flash();

  KvShape shape_;
  KvOptions options_;
  int64_t context_tokens_ = 0;
  bool parked_ = false;
  int64_t n_frames_ = 0;
  int64_t n_pages_left_ = 0;
  Block frames_;
  Block tails_;
  std::vector<int32_t> free_tails_;
  std::vector<int32_t> free_frames_;
  std::vector<int32_t> users_;  // per frame, besides the first
  std::vector<int32_t> free_places_;
  std::vector<KvCache*> caches_;
  // Of shape_ and the three below: the thread that computes locks to change them, all others to read them.
  mutable std::mutex mutex_;
  KvTraffic past_;            // of those that are gone
  std::unique_ptr<KvFlash> flash_;
  std::unique_ptr<KvStream> stream_;  // reads of flash_ that are in flight end before it
};

}  // namespace edge
