// Weights in the order a pass needs them, through a ring: a thread reads ahead of the consumer, past the end of one
// pass into the next, so that the drive never waits for the computation. Large ones come in parts, so the ring need not
// hold any of them whole.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/budget.h"
#include "store/stream_part.h"

namespace edge {

class LayerStream final : public WeightStore {
 public:
  // The ring of a plan; kBadArgument when its largest weight, or part of one, does not fit.
  static Result<Block> reserve_ring(const PackDirectory& directory, const StorePlan& plan, const StoreOptions& options,
                                    Budget& budget);
  // Starts reading at once. `order`: every streamed weight, once. The directory must outlive the store.
  static Result<std::unique_ptr<LayerStream>> open(const std::string& path, const PackDirectory& directory,
                                                   std::vector<WeightId> order, Block ring,
                                                   const StoreOptions& options);
  ~LayerStream() override;

  void prefetch(WeightId, RowSet) override {}
  // In stream order. A weight further on skips what lies between; one that has passed means the next pass. A weight
  // still leased is shared. After an error the same weight can be asked for again and is read anew.
  Result<Lease> acquire(WeightId weight, RowSet rows) override;
  Result<TileLease> acquire_tiles(WeightId weight, int64_t first) override;
  StoreStats stats() const override;
  void rewind() override;

 private:
  // One part on its way through the ring. Positions count parts over all passes: position % parts = which part.
  // Ring offsets only grow; the address is offset % ring. So two live slots never overlap while they span less than the
  // ring.
  struct Slot {
    uint64_t position = 0;
    const StreamPart* part = nullptr;
    uint64_t begin = 0, end = 0;  // ring offsets
    uint64_t issued = 0;          // stored bytes of the weight up to here
    uint64_t landed_bytes = 0;    // read and checked
    int n_flying = 0;
    int n_leases = 0;
    bool passed = false;  // the consumer will not ask for it any more
    Status status;

    bool ready() const { return !status.ok() || landed_bytes == part->end - part->begin; }
  };
  struct Flight {
    ReadRun run;
    std::vector<Slot*> slots;      // one per span
    std::vector<Status> statuses;  // one per span, once landed
  };

  LayerStream(const PackDirectory& directory, std::vector<StreamPart> parts, Block ring);

  // The reading thread. cut() and land() with mutex_ held, check() without.
  void read();
  bool cut(Flight* flight);
  void check(Flight* flight, const Status& read) const;
  void land(Flight* flight);

  // mutex_ held.
  Slot* slot_at(uint64_t position);
  Slot* next_slot();
  void seek(uint64_t position);
  void free_passed();
  // The slot of a part, checked; as acquire().
  Result<Slot*> wait_for(uint64_t index, std::unique_lock<std::mutex>& lock);
  Lease lease(Slot* slot);
  void release(Slot* slot);
  // Where the weight's first byte is, or would be if it were all there.
  std::byte* weight_memory(const Slot& slot) const {
    return ring_.data() + slot.begin % ring_bytes_ + slot.part->lead_bytes() - slot.part->begin;
  }

  const PackDirectory& directory_;
  const std::vector<StreamPart> parts_;  // of a pass
  std::vector<int64_t> index_;           // of its first part, per weight of the directory; -1 = not streamed
  Block ring_;
  uint64_t ring_bytes_ = 0;
  std::unique_ptr<BlockReader> reader_;  // the thread's

  mutable std::mutex mutex_;
  std::condition_variable space_;            // ring space was freed, the position moved, or stop
  std::condition_variable ready_;            // a slot became ready, the thread starved or broke down
  std::deque<std::unique_ptr<Slot>> slots_;  // in ring order
  uint64_t head_ = 0;                        // ring offset of the next slot
  uint64_t next_position_ = 0;               // the consumer's
  uint64_t issue_position_ = 0;              // of the next slot to be placed
  Slot* issuing_ = nullptr;                  // placed, and with bytes left to issue
  int n_flying_ = 0;
  bool starved_ = false;  // the thread sleeps: no space, nothing in flight
  bool stop_ = false;
  Status broken_;  // the reader itself failed; nothing will land any more
  // The beginning of the tile that the part leased last breaks off, for the part that ends it.
  std::vector<std::byte> carry_;
  uint64_t carry_index_ = 0;  // of the part it is for; 0 is nobody's, as a pass begins with a whole tile
  StoreStats stats_;
  std::thread thread_;
};

}  // namespace edge
