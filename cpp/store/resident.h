// Weights read once and kept: one block of memory in file order, filled by long reads. Which they are may change: what
// stays is moved together, not read again.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "core/budget.h"
#include "store/weight_store.h"

namespace edge {

class Resident final : public WeightStore {
 public:
  // Holds nothing yet. The directory and the budget must outlive the store.
  Resident(const PackDirectory& directory, Budget& budget)
      : directory_(directory), budget_(budget), data_(directory.entries().size()) {}

  // Drops all but these. No leases may be held.
  void keep(std::vector<WeightId> weights);
  // Reads and checks those of `weights` that are not held, and drops all others. On any error, or when cancelled, those
  // that were held stay. No leases may be held.
  Status load(const std::string& path, std::vector<WeightId> weights, const StoreOptions& options);

  void prefetch(WeightId, RowSet) override {}
  // Whole weights and single rows are views; several rows are gathered into a block of their own.
  Result<Lease> acquire(WeightId weight, RowSet rows) override;
  StoreStats stats() const override;

 private:
  Status read(const std::string& path, const std::vector<WeightId>& weights, const StoreOptions& options);

  const PackDirectory& directory_;
  Budget& budget_;
  Block memory_;
  std::vector<std::byte*> data_;  // per weight of the directory; null = not held here
  // As stats() tells them, from any thread.
  std::atomic<uint64_t> resident_bytes_{0}, load_bytes_{0}, hits_{0};
  std::atomic<const char*> io_engine_{"none"};
  std::atomic<bool> io_direct_{false};
};

}  // namespace edge
