// Every weight where the plan put it: resident, streamed or read on demand, behind one WeightStore.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/budget.h"
#include "store/demand_cache.h"
#include "store/layer_stream.h"
#include "store/neuron_window.h"
#include "store/resident.h"
#include "store/weight_store.h"

namespace edge {

// Holds nothing until place(). The plan may change between passes: what the old and the new one both keep is not read
// again.
class PlacedStore final : public WeightStore {
 public:
  // The directory and the budget must outlive the store.
  PlacedStore(std::string path, const PackDirectory& directory, const StoreOptions& options, Budget& budget);

  // kBadArgument when a plan does not fit the pack.
  static Status check(const PackDirectory& directory, const StorePlan& plan);

  // Gives back the memory of what `plan` does not keep; reads nothing. Until place() weights cannot be acquired.
  void release(const StorePlan& plan);
  // Releases, reads what is missing, starts the stream. kBadArgument, kOverBudget, kDiskError, kCorrupt, kCancelled; place()
  // may then be called again, with this plan or another. `progress` may be null.
  Status place(const StorePlan& plan, LoadProgress* progress);
  // Reads ahead of the first pass what the plan leaves to demand, as far as there is room (DemandCache::fill).
  Status fill(LoadProgress* progress);

  void prefetch(WeightId weight, RowSet rows) override;
  void expect(std::span<const ExpectedWeight> weights, int64_t n_rows) override;
  size_t first_ready(std::span<const WeightId> weights) override;
  bool guesses(WeightId weight, int distance) override;
  void guess(std::span<const WeightId> weights, int distance) override;
  bool has(WeightId weight) const override { return route(weight, {}) != nullptr; }
  Result<Lease> acquire(WeightId weight, RowSet rows) override;
  Result<TileLease> acquire_tiles(WeightId weight, int64_t first) override;
  void rewind() override;
  void commit(std::span<const int32_t> path) override;
  NeuronWindow* neurons() override { return neurons_.get(); }
  // From any thread. What parts of former plans read is counted too.
  StoreStats stats() const override;

 private:
  WeightStore* route(WeightId weight, RowSet rows) const;
  Status place_parts(const StorePlan& plan, const StoreOptions& options);
  bool resize_demand(uint64_t bytes);
  // Takes a part away; what it counted stays counted.
  template <typename Part>
  void retire(std::unique_ptr<Part>& part);
  template <typename Part>
  void install(std::unique_ptr<Part>& part, std::unique_ptr<Part> made);

  const std::string path_;
  const PackDirectory& directory_;
  const StoreOptions options_;
  Budget& budget_;
  StorePlan plan_;
  bool is_placed_ = false;
  mutable std::mutex mutex_;  // of the pointers below as stats() sees them
  StoreStats past_;           // of the parts that are gone
  std::unique_ptr<Resident> resident_;
  std::unique_ptr<DemandCache> demand_;
  std::unique_ptr<LayerStream> stream_;
  std::unique_ptr<NeuronWindow> neurons_;
};

// A store with a plan in place.
Result<std::unique_ptr<PlacedStore>> open_store(const std::string& path, const PackDirectory& directory,
                                                const StorePlan& plan, const StoreOptions& options, Budget& budget);

}  // namespace edge
