#include "store/neuron_window.h"

#include <algorithm>
#include <array>
#include <limits>

#include "store/read_run.h"

namespace edge {
namespace {

constexpr size_t kRowBits = 64;
// Requests of a few KiB: a drive takes many more of them at once than of long ones.
constexpr int kRecordDepth = 256;

// Elements of every table a plan needs, so that their sum is known before anything is reserved.
struct Tables {
  uint64_t slot_bytes = 0;    // slots of all entries, each from a page boundary on
  uint64_t n_wide = 0;        // 8 bytes each: used_by
  uint64_t n_narrow = 0;      // 4 bytes each: slot_of, key, touched, held
  uint64_t most_neurons = 0;  // of an entry that is not whole
  uint64_t most_slots = 0;

  uint64_t bytes(uint64_t turn_bytes, uint64_t slot_bytes) const {
    return 8 * n_wide + 4 * n_narrow + (turn_bytes + 4) * most_neurons + slot_bytes * most_slots;
  }
};

template <typename Visit>
void each_entry(const PackDirectory& directory, const StorePlan& plan, const Visit& visit) {
  for (size_t i = 0; i < plan.neuron_slots.size() && i < plan.placement.size(); ++i) {
    if (plan.placement[i] == Placement::kNeurons) {
      visit(static_cast<WeightId>(i), directory.entries()[i], plan.neuron_slots[i]);
    }
  }
}

Tables tables_of(const PackDirectory& directory, const StorePlan& plan) {
  Tables tables;
  each_entry(directory, plan, [&](WeightId, const PackEntry& entry, int64_t n_slots) {
    const auto slots = static_cast<uint64_t>(n_slots), neurons = static_cast<uint64_t>(entry.rows);
    tables.slot_bytes += round_up(slots * entry.chunk_bytes, kReadAlign);
    if (slots == neurons) return;
    tables.n_wide += neurons;
    tables.n_narrow += 3 * neurons + slots;
    tables.most_neurons = std::max(tables.most_neurons, neurons);
    tables.most_slots = std::max(tables.most_slots, slots);
  });
  return tables;
}

}  // namespace

uint64_t NeuronWindow::plan_bytes(const PackDirectory& directory, const StorePlan& plan) {
  const Tables tables = tables_of(directory, plan);
  return tables.slot_bytes + round_up(tables.bytes(sizeof(Miss) + sizeof(Guess), sizeof(Leaving)), kReadAlign);
}

uint64_t NeuronWindow::staging_least_bytes(const PackEntry& entry) {
  return 2 * (round_up(entry.chunk_bytes, kReadAlign) + kReadAlign);
}

NeuronWindow::NeuronWindow(std::string path, const PackDirectory& directory, const StoreOptions& options)
    : path_(std::move(path)), directory_(directory), options_(options), policy_(options.neuron_half_life_tokens) {}

NeuronWindow::~NeuronWindow() = default;

Result<std::unique_ptr<NeuronWindow>> NeuronWindow::open(const std::string& path, const PackDirectory& directory,
                                                         const StorePlan& plan, const StoreOptions& options,
                                                         Budget& budget) {
  std::unique_ptr<NeuronWindow> window(new NeuronWindow(path, directory, options));
  EDGE_TRY(window->reserve(plan, budget));
  EDGE_TRY(window->open_reader_again());
  return window;
}

Status NeuronWindow::open_reader_again() {
  EDGE_ASSIGN(reader_, open_reader(path_, reader_options(options_, kRecordDepth)));
  return {};
}

Status NeuronWindow::reserve(const StorePlan& plan, Budget& budget) {
  Status status;
  each_entry(directory_, plan, [&](WeightId, const PackEntry& entry, int64_t n_slots) {
    if (!status.ok()) return;
    if (n_slots < 0 || n_slots > entry.rows || entry.rows > std::numeric_limits<int32_t>::max()) {
      status = error(Code::kBadArgument, "store plan: %s: expected slots for 0 to %lld neurons, found %lld",
                     entry.name.c_str(), static_cast<long long>(entry.rows), static_cast<long long>(n_slots));
    } else if (n_slots < entry.rows && plan.neuron_staging_bytes < staging_least_bytes(entry)) {
      status = error(Code::kBadArgument, "store plan: %s: expected at least %llu bytes of staging, found %llu",
                     entry.name.c_str(), static_cast<unsigned long long>(staging_least_bytes(entry)),
                     static_cast<unsigned long long>(plan.neuron_staging_bytes));
    }
  });
  EDGE_TRY(status);
  const Tables tables = tables_of(directory_, plan);
  const uint64_t needed = plan_bytes(directory_, plan);
  if (needed > plan.neuron_bytes) {
    return error(Code::kBadArgument, "store plan: expected %llu bytes for the slots of neurons, found %llu",
                 static_cast<unsigned long long>(needed), static_cast<unsigned long long>(plan.neuron_bytes));
  }
  if (tables.slot_bytes > 0) {
    EDGE_ASSIGN(slots_, budget.reserve(tables.slot_bytes, "neurons"));
  }
  const bool windowed = tables.most_neurons > 0;
  if (windowed) {
    EDGE_ASSIGN(tables_, budget.reserve(tables.bytes(sizeof(Miss) + sizeof(Guess), sizeof(Leaving)), "neurons"));
    EDGE_ASSIGN(staging_, budget.reserve(plan.neuron_staging_bytes / kReadAlign * kReadAlign, "neuron staging"));
    const uint64_t half = staging_.bytes() / 2 / kReadAlign * kReadAlign;
    for (size_t i = 0; i < rings_.size(); ++i) {
      rings_[i].data = staging_.data() + i * half;
      rings_[i].bytes = half;
    }
  }
  uint64_t* wide = tables_.as<uint64_t>();
  // Wide members first, so that every table is aligned.
  misses_ = reinterpret_cast<Miss*>(wide + tables.n_wide);
  guesses_ = reinterpret_cast<Guess*>(misses_ + tables.most_neurons);
  auto* narrow = reinterpret_cast<int32_t*>(guesses_ + tables.most_neurons);
  std::byte* slots = slots_.data();
  layer_of_.assign(directory_.entries().size(), -1);
  each_entry(directory_, plan, [&](WeightId weight, const PackEntry& entry, int64_t n_slots) {
    Layer layer;
    layer.weight = weight;
    layer.entry = &entry;
    layer.record_bytes = entry.chunk_bytes;
    layer.n_neurons = entry.rows;
    layer.n_slots = n_slots;
    layer.slots = slots;
    slots += round_up(static_cast<uint64_t>(n_slots) * entry.chunk_bytes, kReadAlign);
    if (!layer.is_whole()) {
      layer.used_by = wide;
      wide += layer.n_neurons;
      layer.slot_of = narrow;
      layer.touched = narrow + layer.n_neurons;
      layer.key = reinterpret_cast<float*>(narrow + 2 * layer.n_neurons);
      layer.held = narrow + 3 * layer.n_neurons;
      narrow = layer.held + n_slots;
      std::fill_n(layer.slot_of, layer.n_neurons, -1);
      std::fill_n(layer.key, layer.n_neurons, NeuronPolicy::kNeverUsed);
    }
    layer_of_[static_cast<size_t>(weight)] = static_cast<int32_t>(layers_.size());
    layers_.push_back(layer);
    load_bytes_ += round_up(static_cast<uint64_t>(n_slots) * entry.chunk_bytes, kReadAlign);
  });
  by_worth_ = narrow;
  leaving_ = reinterpret_cast<Leaving*>(by_worth_ + tables.most_neurons);
  return {};
}

Status NeuronWindow::load(LoadProgress* progress) {
  for (Layer& layer : layers_) EDGE_TRY(load_layer(layer, progress));
  return {};
}

Status NeuronWindow::load_layer(Layer& layer, LoadProgress* progress) {
  const uint64_t total = round_up(static_cast<uint64_t>(layer.n_slots) * layer.record_bytes, kReadAlign);
  Status first;
  uint64_t begin = 0;
  int n_flying = 0;
  for (;;) {
    if (first.ok() && progress != nullptr && progress->cancel) {
      first = error(Code::kCancelled, "%s: loading was cancelled", path_.c_str());
    }
    while (first.ok() && begin < total && n_flying < reader_->depth()) {
      const uint64_t bytes = std::min(kRunBytes, total - begin);
      first = reader_->submit({layer.entry->offset + begin, bytes, layer.slots + begin, bytes});
      if (!first.ok()) break;
      begin += bytes;
      ++n_flying;
    }
    if (n_flying == 0) break;
    EDGE_ASSIGN(const ReadCompletion completion, reader_->wait());
    --n_flying;
    if (first.ok()) first = completion.status;
    if (progress != nullptr) progress->done_bytes += completion.tag;
  }
  EDGE_TRY(first);
  for (int64_t neuron = 0; neuron < layer.n_slots; ++neuron) {
    EDGE_TRY(check_record(*layer.entry, neuron, layer.slots + static_cast<uint64_t>(neuron) * layer.record_bytes));
  }
  if (layer.is_whole()) return {};
  for (int32_t neuron = 0; neuron < layer.n_slots; ++neuron) layer.slot_of[neuron] = layer.held[neuron] = neuron;
  return {};
}

Status NeuronWindow::check_record(const PackEntry& entry, int64_t neuron, const std::byte* record) const {
  const Status status =
      directory_.check(entry, static_cast<uint64_t>(neuron) * entry.chunk_bytes, {record, entry.chunk_bytes});
  if (status.ok()) return {};
  return error(status.code(), "layer %d, neuron %lld: %s", entry.layer, static_cast<long long>(neuron),
               status.message().c_str());
}

const std::byte* NeuronWindow::whole(WeightId weight) const {
  if (weight < 0 || static_cast<size_t>(weight) >= layer_of_.size()) return nullptr;
  const int32_t index = layer_of_[static_cast<size_t>(weight)];
  if (index < 0 || !layers_[static_cast<size_t>(index)].is_whole()) return nullptr;
  return layers_[static_cast<size_t>(index)].slots;
}

void NeuronWindow::commit(std::span<const int32_t> path) {
  settle();
  // Rows that share a bit count once, at the last of them: prompts alone have so many.
  uint64_t kept = 0;
  std::array<int64_t, kRowBits> token_of{};
  for (size_t i = 0; i < path.size(); ++i) {
    const size_t bit = static_cast<size_t>(path[i]) % kRowBits;
    kept |= uint64_t{1} << bit;
    token_of[bit] = n_committed_ + static_cast<int64_t>(i);
  }
  n_committed_ += static_cast<int64_t>(path.size());
  for (Layer& layer : layers_) {
    for (int64_t i = 0; i < layer.n_touched; ++i) {
      const int32_t neuron = layer.touched[i];
      for (uint64_t bits = layer.used_by[neuron] & kept; bits != 0; bits &= bits - 1) {
        const auto bit = static_cast<size_t>(std::countr_zero(bits));
        layer.key[neuron] = policy_.used(layer.key[neuron], token_of[bit]);
      }
      layer.used_by[neuron] = 0;
    }
    layer.n_touched = 0;
  }
}

void NeuronWindow::rollback() {
  abandon();
  for (Layer& layer : layers_) {
    for (int64_t i = 0; i < layer.n_touched; ++i) layer.used_by[layer.touched[i]] = 0;
    layer.n_touched = 0;
  }
}

void NeuronWindow::add_stats(StoreStats* stats) const {
  const double wait_seconds = 1e-9 * static_cast<double>(wait_ns_.load());
  for (const Layer& layer : layers_) {
    const uint64_t bytes = round_up(static_cast<uint64_t>(layer.n_slots) * layer.record_bytes, kReadAlign);
    (layer.is_whole() ? stats->resident_bytes : stats->staging_bytes) += bytes;
  }
  stats->load_bytes += load_bytes_;
  stats->staging_bytes += staging_.bytes() + tables_.bytes();
  stats->flash_bytes += flash_bytes_;
  stats->wait_seconds += wait_seconds;
  stats->neurons_wanted += n_wanted_;
  stats->neuron_hits += n_hits_;
  stats->neurons_passed_over += n_passed_over_;
  stats->neuron_requests += n_requests_;
  stats->neurons_expected += n_expected_;
  stats->neuron_expected_hits += n_expected_hits_;
  stats->neuron_bytes += flash_bytes_;
  stats->neuron_wait_seconds += wait_seconds;
}

}  // namespace edge
