// Weights read when they are asked for: rows of an embedding, experts of a mixture. Whole weights stay until the least
// recently used make room. One block of memory, fixed at open; no thread of its own.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/budget.h"
#include "store/extent_pool.h"
#include "store/read_run.h"

namespace edge {

class DemandCache final : public WeightStore {
 public:
  // The directory and the budget must outlive the store.
  static Result<std::unique_ptr<DemandCache>> open(const std::string& path, const PackDirectory& directory,
                                                   uint64_t demand_bytes, const StoreOptions& options, Budget& budget);
  ~DemandCache() override;

  // What a lease of `n_rows` rows takes at most while it is being read: the chunks its tiles touch, and the gathered
  // tiles when there are several.
  static uint64_t row_lease_bytes(const PackEntry& entry, size_t n_rows);

  // Whole weights: starts the read where room can be made without dropping what was fetched and not yet used.
  // Rows: nothing; a row is one short read.
  void prefetch(WeightId weight, RowSet rows) override;
  Result<Lease> acquire(WeightId weight, RowSet rows) override;
  StoreStats stats() const override;

 private:
  // Something being read into the pool.
  struct Load {
    std::deque<ReadRun> waiting;
    int n_flying = 0;
    Status status;
    bool landed() const { return n_flying == 0 && waiting.empty(); }
  };
  struct Cached {
    WeightId weight = kNoWeight;
    uint64_t offset = 0;  // in the pool
    int n_leases = 0;
    bool wanted = true;  // fetched ahead, not acquired yet
    Load load;
  };
  using Entries = std::list<Cached>;  // most recently used first
  struct Flight {
    Load* load = nullptr;
    ReadRun run;
  };

  DemandCache(const PackDirectory& directory, uint64_t bytes) : directory_(directory), pool_(bytes) {}

  Result<Lease> acquire_whole(WeightId weight);
  Result<Lease> acquire_rows(WeightId weight, RowSet rows);
  Result<Entries::iterator> start(WeightId weight, bool demanded);
  void drop(Entries::iterator cached);
  std::optional<Entries::iterator> victim(bool demanded);
  // Room for `bytes`, made by dropping cached weights; kOverBudget when leases hold too much.
  Result<uint64_t> make_room(uint64_t bytes, const PackEntry& entry, bool demanded);

  // Submits waiting runs while the reader takes them without blocking.
  Status pump();
  // Waits for one read and accounts for it. An error here is the reader's own; that of a read is its load's.
  Status step();

  const PackDirectory& directory_;
  Block memory_;
  ExtentPool pool_;
  Entries cached_;
  std::unordered_map<WeightId, Entries::iterator> by_weight_;
  std::list<Load> row_loads_;
  std::deque<Load*> queue_;  // loads with runs waiting; demanded ones first
  std::vector<Flight> flights_;
  std::vector<size_t> free_flights_;
  std::atomic<uint64_t> flash_bytes_{0}, hits_{0}, misses_{0}, wait_ns_{0};
  std::unique_ptr<BlockReader> reader_;  // last: destroyed first, while what it reads into still stands
};

}  // namespace edge
