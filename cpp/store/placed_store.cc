#include "store/placed_store.h"

#include <algorithm>

namespace edge {
namespace {

std::vector<WeightId> weights_in(const PackDirectory& directory, const StorePlan& plan, Placement placement) {
  std::vector<WeightId> found;
  for (size_t i = 0; i < plan.placement.size(); ++i) {
    if (directory.entries()[i].format == WeightFormat::kBytes) continue;
    if (plan.placement[i] == placement) found.push_back(static_cast<WeightId>(i));
  }
  return found;
}

void add_traffic(const StoreStats& part, StoreStats* sum) {
  sum->flash_bytes += part.flash_bytes;
  sum->load_bytes += part.load_bytes;
  sum->hits += part.hits;
  sum->misses += part.misses;
  sum->wait_seconds += part.wait_seconds;
  sum->experts_guessed += part.experts_guessed;
  sum->experts_guessed_right += part.experts_guessed_right;
  sum->neurons_wanted += part.neurons_wanted;
  sum->neuron_hits += part.neuron_hits;
  sum->neuron_bytes += part.neuron_bytes;
  sum->neurons_passed_over += part.neurons_passed_over;
  sum->neuron_requests += part.neuron_requests;
  sum->neurons_expected += part.neurons_expected;
  sum->neuron_expected_hits += part.neuron_expected_hits;
  sum->neuron_wait_seconds += part.neuron_wait_seconds;
}

StoreStats stats_of(const WeightStore& part) { return part.stats(); }
StoreStats stats_of(const NeuronWindow& part) {
  StoreStats stats;
  part.add_stats(&stats);
  return stats;
}

}  // namespace

PlacedStore::PlacedStore(std::string path, const PackDirectory& directory, const StoreOptions& options, Budget& budget)
    : path_(std::move(path)), directory_(directory), options_(options), budget_(budget),
      resident_(std::make_unique<Resident>(directory, budget)) {}

template <typename Part>
void PlacedStore::retire(std::unique_ptr<Part>& part) {
  if (part == nullptr) return;
  std::unique_ptr<Part> gone;
  std::lock_guard lock(mutex_);
  add_traffic(stats_of(*part), &past_);
  gone = std::move(part);
}

template <typename Part>
void PlacedStore::install(std::unique_ptr<Part>& part, std::unique_ptr<Part> made) {
  std::lock_guard lock(mutex_);
  part = std::move(made);
}

bool PlacedStore::resize_demand(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  return demand_->resize(bytes, budget_).ok();
}

void PlacedStore::release(const StorePlan& plan) {
  if (is_placed_ && plan == plan_) return;
  is_placed_ = false;
  retire(stream_);
  retire(neurons_);
  resident_->keep(weights_in(directory_, plan, Placement::kResident));
  if (demand_ == nullptr || plan.demand_bytes >= demand_->bytes()) return;
  if (plan.demand_bytes == 0 || !resize_demand(plan.demand_bytes)) retire(demand_);
}

Status PlacedStore::place(const StorePlan& plan, LoadProgress* progress) {
  if (is_placed_ && plan == plan_) return {};
  EDGE_TRY(check(directory_, plan));
  release(plan);
  StoreOptions options = options_;
  options.progress = progress;
  plan_ = plan;
  const Status status = place_parts(plan, options);
  is_placed_ = status.ok();
  return status;
}

Status PlacedStore::place_parts(const StorePlan& plan, const StoreOptions& options) {
  const bool any_demanded = plan.demand_bytes > 0 || !weights_in(directory_, plan, Placement::kDemand).empty();
  const bool any_neurons = !weights_in(directory_, plan, Placement::kNeurons).empty();
  // The fixed parts first: what the budget cannot hold is known before anything is read.
  if (any_demanded && demand_ != nullptr && !resize_demand(plan.demand_bytes)) retire(demand_);
  if (any_demanded && demand_ == nullptr) {
    EDGE_ASSIGN(auto made, DemandCache::open(path_, directory_, plan.demand_bytes, options, budget_));
    install(demand_, std::move(made));
  }
  Block ring;
  if (!plan.stream_order.empty()) {
    EDGE_ASSIGN(ring, LayerStream::reserve_ring(directory_, plan, options, budget_));
  }
  if (any_neurons) {
    EDGE_ASSIGN(auto made, NeuronWindow::open(path_, directory_, plan, options, budget_));
    if (options.progress != nullptr) options.progress->total_bytes += made->load_bytes();
    install(neurons_, std::move(made));
  }
  EDGE_TRY(resident_->load(path_, weights_in(directory_, plan, Placement::kResident), options));
  if (any_neurons) EDGE_TRY(neurons_->load(options.progress));
  // Last: its thread reads from here on, and would compete with the load.
  if (!plan.stream_order.empty()) {
    EDGE_ASSIGN(auto made, LayerStream::open(path_, directory_, plan.stream_order, std::move(ring), options));
    install(stream_, std::move(made));
  }
  return {};
}

Status PlacedStore::fill(LoadProgress* progress) {
  return demand_ == nullptr ? Status() : demand_->fill(weights_in(directory_, plan_, Placement::kDemand), progress);
}

void PlacedStore::prefetch(WeightId weight, RowSet rows) {
  if (WeightStore* store = route(weight, rows)) store->prefetch(weight, rows);
}

void PlacedStore::expect(std::span<const ExpectedWeight> weights, int64_t n_rows) {
  if (weights.empty()) return;
  WeightStore* const store = route(weights[0].weight, {});
  const auto is_there = [&](const ExpectedWeight& one) { return route(one.weight, {}) == store; };
  const bool together = std::all_of(weights.begin(), weights.end(), is_there);
  if (together && store != nullptr) store->expect(weights, n_rows);
  else WeightStore::expect(weights, n_rows);
}

size_t PlacedStore::first_ready(std::span<const WeightId> weights) {
  WeightStore* const store = route(weights[0], {});
  return store == nullptr ? 0 : store->first_ready(weights);
}

bool PlacedStore::guesses(WeightId weight, int distance) {
  return demand_ != nullptr && route(weight, {}) == demand_.get() && demand_->guesses(weight, distance);
}

void PlacedStore::guess(std::span<const WeightId> weights, int distance) {
  if (demand_ != nullptr) demand_->guess(weights, distance);
}

Result<Lease> PlacedStore::acquire(WeightId weight, RowSet rows) {
  // Here because weights are acquired all the time while a pass computes. A broken reader is told by what needs it.
  if (demand_ != nullptr) (void)demand_->read_on();
  if (WeightStore* store = route(weight, rows)) return store->acquire(weight, rows);
  return error(Code::kBadArgument, "weight %d is not placed in any store", weight);
}

Result<TileLease> PlacedStore::acquire_tiles(WeightId weight, int64_t first) {
  if (WeightStore* store = route(weight, {})) return store->acquire_tiles(weight, first);
  return error(Code::kBadArgument, "weight %d is not placed in any store", weight);
}

void PlacedStore::rewind() {
  if (stream_ != nullptr) stream_->rewind();
  if (neurons_ != nullptr) neurons_->rollback();
}

void PlacedStore::commit(std::span<const int32_t> path) {
  if (neurons_ != nullptr) neurons_->commit(path);
}

StoreStats PlacedStore::stats() const {
  std::lock_guard lock(mutex_);
  StoreStats sum = past_;
  const auto add = [&](const StoreStats& part) {
    add_traffic(part, &sum);
    sum.resident_bytes += part.resident_bytes;
    sum.staging_bytes += part.staging_bytes;
    sum.pass_expert_bytes += part.pass_expert_bytes;
  };
  const auto add_store = [&](const WeightStore* store) {
    if (store == nullptr) return;
    const StoreStats part = store->stats();
    add(part);
    sum.io_engine = part.io_engine;
    sum.io_direct = part.io_direct;
  };
  add_store(resident_.get());
  add_store(demand_.get());
  add_store(stream_.get());
  if (neurons_ != nullptr) add(stats_of(*neurons_));
  return sum;
}

WeightStore* PlacedStore::route(WeightId weight, RowSet rows) const {
  if (!is_placed_ || weight < 0 || static_cast<size_t>(weight) >= plan_.placement.size()) return nullptr;
  const PackEntry& entry = directory_.entry(weight);
  if (entry.format == WeightFormat::kBytes) return nullptr;
  switch (plan_.placement[static_cast<size_t>(weight)]) {
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

Status PlacedStore::check(const PackDirectory& directory, const StorePlan& plan) {
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
    const bool has_slots = plan.placement[i] == Placement::kNeurons, is_neurons = is_neuron_format(entry.format);
    const bool streams = plan.placement[i] == Placement::kStream;
    if (has_slots ? !is_neurons || i >= plan.neuron_slots.size() : is_neurons && !streams) {
      return error(Code::kBadArgument, "store plan: %s: expected records of neurons where the plan has their slots",
                   entry.name.c_str());
    }
    if (plan.placement[i] > Placement::kUnused) {
      return error(Code::kBadArgument, "store plan: %s has the unknown placement %d", entry.name.c_str(),
                   static_cast<int>(plan.placement[i]));
    }
    if (streams && !ordered[i]) {
      return error(Code::kBadArgument, "store plan: %s is streamed, but not in the stream order", entry.name.c_str());
    }
  }
  return {};
}

Result<std::unique_ptr<PlacedStore>> open_store(const std::string& path, const PackDirectory& directory,
                                                const StorePlan& plan, const StoreOptions& options, Budget& budget) {
  EDGE_TRY(PlacedStore::check(directory, plan));
  auto store = std::make_unique<PlacedStore>(path, directory, options, budget);
  EDGE_TRY(store->place(plan, options.progress));
  if (options.fill_experts) EDGE_TRY(store->fill(options.progress));
  return store;
}

}  // namespace edge
