#include "store/placed_store.h"

#include "store/resident.h"

namespace edge {
namespace {

class PlacedStore final : public WeightStore {
 public:
  PlacedStore(std::vector<Placement> placement, std::unique_ptr<Resident> resident)
      : placement_(std::move(placement)), resident_(std::move(resident)) {}

  void prefetch(WeightId, RowSet) override {}
  Result<Lease> acquire(WeightId weight, RowSet rows) override { return resident_->acquire(weight, rows); }
  StoreStats stats() const override { return resident_->stats(); }

 private:
  std::vector<Placement> placement_;
  std::unique_ptr<Resident> resident_;
};

}  // namespace

Result<std::unique_ptr<WeightStore>> open_store(const std::string& path, const PackDirectory& directory, const StorePlan& plan,
                                                const StoreOptions& options, Budget& budget) {
  if (plan.placement.size() != directory.entries().size()) {
    return error(Code::kBadArgument, "store plan: expected %zu placements, found %zu", directory.entries().size(),
                 plan.placement.size());
  }
  std::vector<WeightId> resident_weights;
  for (size_t i = 0; i < plan.placement.size(); ++i) {
    if (directory.entries()[i].format == WeightFormat::kBytes) continue;
    if (plan.placement[i] != Placement::kResident) {
      return error(Code::kUnsupported, "%s: only resident weights are supported", directory.entries()[i].name.c_str());
    }
    resident_weights.push_back(static_cast<WeightId>(i));
  }
  EDGE_ASSIGN(std::unique_ptr<Resident> resident, Resident::load(path, directory, std::move(resident_weights), options, budget));
  return std::unique_ptr<WeightStore>(new PlacedStore(plan.placement, std::move(resident)));
}

}  // namespace edge
