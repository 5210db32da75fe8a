// Weights read once and kept: one block of memory, filled by long reads in file order.
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
  // Reads and checks all `weights`; on any error, or when cancelled, nothing is kept.
  // The directory and the budget must outlive the store.
  static Result<std::unique_ptr<Resident>> load(const std::string& path, const PackDirectory& directory,
                                                std::vector<WeightId> weights, const StoreOptions& options,
                                                Budget& budget);

  void prefetch(WeightId, RowSet) override {}
  // Whole weights and single rows are views; several rows are gathered into a block of their own.
  Result<Lease> acquire(WeightId weight, RowSet rows) override;
  StoreStats stats() const override;

 private:
  Resident(const PackDirectory& directory, Budget& budget) : directory_(directory), budget_(budget) {}
  Status read(const std::string& path, const std::vector<WeightId>& weights, const StoreOptions& options);

  const PackDirectory& directory_;
  Budget& budget_;
  Block memory_;
  std::vector<std::byte*> data_;  // per weight of the directory; null = not held here
  StoreStats stats_;              // fixed once loaded
  std::atomic<uint64_t> hits_{0};
};

}  // namespace edge
