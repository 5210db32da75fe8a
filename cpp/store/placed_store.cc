#include "store/placed_store.h"

#include <algorithm>

#include "store/demand_cache.h"
#include "store/layer_stream.h"
#include "store/neuron_window.h"
#include "store/resident.h"

namespace edge {
namespace {

class PlacedStore final : public WeightStore {
 public:
  PlacedStore(const PackDirectory& directory, std::vector<Placement> placement)
      : directory_(directory), placement_(std::move(placement)) {}

  Status open(const std::string& path, const StorePlan& plan, const StoreOptions& options, Budget& budget) {
    std::vector<WeightId> kept;
    bool any_demanded = plan.demand_bytes > 0, any_neurons = false;
    for (size_t i = 0; i < placement_.size(); ++i) {
      if (directory_.entries()[i].format == WeightFormat::kBytes) continue;
      if (placement_[i] == Placement::kResident) kept.push_back(static_cast<WeightId>(i));
      if (placement_[i] == Placement::kDemand) any_demanded = true;
      if (placement_[i] == Placement::kNeurons) any_neurons = true;
    }
    // The fixed parts first: what the budget cannot hold is known before anything is read.
    if (any_demanded) {
      EDGE_ASSIGN(demand_, DemandCache::open(path, directory_, plan.demand_bytes, options, budget));
    }
    Block ring;
    if (!plan.stream_order.empty()) {
      EDGE_ASSIGN(ring, LayerStream::reserve_ring(directory_, plan, options, budget));
    }
    if (any_neurons) {
      EDGE_ASSIGN(neurons_, NeuronWindow::open(path, directory_, plan, options, budget));
      if (options.progress != nullptr) options.progress->total_bytes += neurons_->load_bytes();
    }
    EDGE_ASSIGN(resident_, Resident::load(path, directory_, std::move(kept), options, budget));
    if (any_neurons) EDGE_TRY(neurons_->load(options.progress));
    // Last: its thread reads from here on, and would compete with the load.
    if (!plan.stream_order.empty()) {
      EDGE_ASSIGN(stream_, LayerStream::open(path, directory_, plan.stream_order, std::move(ring), options));
    }
    return {};
  }

  void prefetch(WeightId weight, RowSet rows) override {
    if (WeightStore* store = route(weight, rows)) store->prefetch(weight, rows);
  }

  void expect(std::span<const ExpectedWeight> weights, int64_t n_rows) override {
    if (weights.empty()) return;
    WeightStore* const store = route(weights[0].weight, {});
    const auto is_there = [&](const ExpectedWeight& one) { return route(one.weight, {}) == store; };
    const bool together = std::all_of(weights.begin(), weights.end(), is_there);
    if (together && store != nullptr) store->expect(weights, n_rows);
    else WeightStore::expect(weights, n_rows);
  }

  size_t first_ready(std::span<const WeightId> weights) override {
    WeightStore* const store = route(weights[0], {});
    return store == nullptr ? 0 : store->first_ready(weights);
  }

  Result<Lease> acquire(WeightId weight, RowSet rows) override {
    if (WeightStore* store = route(weight, rows)) return store->acquire(weight, rows);
    return error(Code::kBadArgument, "weight %d is not placed in any store", weight);
  }

  Result<TileLease> acquire_tiles(WeightId weight, int64_t first) override {
    if (WeightStore* store = route(weight, {})) return store->acquire_tiles(weight, first);
    return error(Code::kBadArgument, "weight %d is not placed in any store", weight);
  }

  void rewind() override {
    if (stream_ != nullptr) stream_->rewind();
    if (neurons_ != nullptr) neurons_->rollback();
  }

  void commit(std::span<const int32_t> path) override {
    if (neurons_ != nullptr) neurons_->commit(path);
  }

  NeuronWindow* neurons() override { return neurons_.get(); }

  StoreStats stats() const override {
    StoreStats sum = resident_->stats();
    const auto add = [&](const WeightStore* store) {
      if (store == nullptr) return;
      const StoreStats stats = store->stats();
      sum.flash_bytes += stats.flash_bytes;
      sum.staging_bytes += stats.staging_bytes;
      sum.hits += stats.hits;
      sum.misses += stats.misses;
      sum.pass_expert_bytes += stats.pass_expert_bytes;
      sum.wait_seconds += stats.wait_seconds;
      sum.io_engine = stats.io_engine;
      sum.io_direct = stats.io_direct;
    };
    add(demand_.get());
    add(stream_.get());
    if (neurons_ != nullptr) neurons_->add_stats(&sum);
    return sum;
  }

 private:
  WeightStore* route(WeightId weight, RowSet rows) const {
    if (weight < 0 || static_cast<size_t>(weight) >= placement_.size()) return nullptr;
    const PackEntry& entry = directory_.entry(weight);
    if (entry.format == WeightFormat::kBytes) return nullptr;
    switch (placement_[static_cast<size_t>(weight)]) {
      case Placement::kResident: return resident_.get();
      case Placement::kDemand: return demand_.get();
      // A few rows of a streamed weight (an embedding that is the head as well) are not worth a pass.
      case Placement::kStream:
        return !rows.empty() && is_tile_format(entry.format) ? static_cast<WeightStore*>(demand_.get()) : stream_.get();
      case Placement::kNeurons:
      case Placement::kUnused: return nullptr;
    }
    return nullptr;
  }

  const PackDirectory& directory_;
  const std::vector<Placement> placement_;
  std::unique_ptr<Resident> resident_;
  std::unique_ptr<DemandCache> demand_;
  std::unique_ptr<LayerStream> stream_;
  std::unique_ptr<NeuronWindow> neurons_;
};

Status check_plan(const PackDirectory& directory, const StorePlan& plan) {
  if (plan.placement.size() != directory.entries().size()) {
    return error(Code::kBadArgument, "store plan: expected %zu placements, found %zu", directory.entries().size(),
                 plan.placement.size());
  }
  std::vector<bool> ordered(plan.placement.size());
  for (const WeightId weight : plan.stream_order) {
    const bool known = weight >= 0 && static_cast<size_t>(weight) < ordered.size();
    if (!known || plan.placement[static_cast<size_t>(weight)] != Placement::kStream ||
        ordered[static_cast<size_t>(weight)] || directory.entry(weight).format == WeightFormat::kBytes) {
      return error(Code::kBadArgument,
                   "store plan: weight %d in the stream order is unknown, not streamed, or there twice", weight);
    }
    ordered[static_cast<size_t>(weight)] = true;
  }
  for (size_t i = 0; i < plan.placement.size(); ++i) {
    const PackEntry& entry = directory.entries()[i];
    if (entry.format == WeightFormat::kBytes || plan.placement[i] == Placement::kUnused) continue;
    const bool of_neurons = plan.placement[i] == Placement::kNeurons;
    if (of_neurons != is_neuron_format(entry.format) || (of_neurons && i >= plan.neuron_slots.size())) {
      return error(Code::kBadArgument, "store plan: %s: expected records of neurons where the plan has their slots",
                   entry.name.c_str());
    }
    if (plan.placement[i] > Placement::kUnused) {
      return error(Code::kBadArgument, "store plan: %s has the unknown placement %d", entry.name.c_str(),
                   static_cast<int>(plan.placement[i]));
    }
    if (plan.placement[i] == Placement::kStream && !ordered[i]) {
      return error(Code::kBadArgument, "store plan: %s is streamed, but not in the stream order", entry.name.c_str());
    }
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<WeightStore>> open_store(const std::string& path, const PackDirectory& directory,
                                                const StorePlan& plan, const StoreOptions& options, Budget& budget) {
  EDGE_TRY(check_plan(directory, plan));
  auto store = std::make_unique<PlacedStore>(directory, plan.placement);
  EDGE_TRY(store->open(path, plan, options, budget));
  return std::unique_ptr<WeightStore>(std::move(store));
}

}  // namespace edge
