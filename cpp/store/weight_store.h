// The model never learns where weights live: it acquires a lease on a weight (or on some of its rows) and computes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"
#include "format/pack_directory.h"
#include "store/neuron_policy.h"

namespace edge {

// Rows of a weight; empty = all. A vector (format kF32Vector or kBytes) is always leased whole.
using RowSet = std::span<const int32_t>;

// A pinned view of a weight's stored bytes (tiles or a vector). Destroying it unpins.
class Lease {
 public:
  Lease() = default;
  Lease(const std::byte* data, const PackEntry* entry, std::function<void()> unpin = {})
      : data_(data), entry_(entry), unpin_(std::move(unpin)) {}
  Lease(Lease&& other) noexcept { *this = std::move(other); }
  Lease& operator=(Lease&& other) noexcept {
    if (this != &other) {
      reset();
      data_ = std::exchange(other.data_, nullptr);
      entry_ = std::exchange(other.entry_, nullptr);
      unpin_ = std::exchange(other.unpin_, {});
    }
    return *this;
  }
  ~Lease() { reset(); }

  // First byte of the weight; for a row lease, of the gathered tiles: tile i holds rows[i], at row rows[i] % 16 of it.
  const std::byte* data() const { return data_; }
  const PackEntry& entry() const { return *entry_; }
  explicit operator bool() const { return data_ != nullptr; }
  void reset() {
    if (unpin_) std::exchange(unpin_, {})();
    data_ = nullptr;
  }

 private:
  const std::byte* data_ = nullptr;
  const PackEntry* entry_ = nullptr;
  std::function<void()> unpin_;
};

// Tiles [first, end_tile) of a matrix, `first` being what was asked for. Of rows of neurons each is a tile.
struct TileLease {
  static constexpr int64_t kAll = INT64_MAX;  // to the last one

  // data() is where tile 0 is or would be.
  Lease lease;
  int64_t end_tile = kAll;
};

struct StoreStats {
  uint64_t flash_bytes = 0;       // read from the drive since load (the initial load of resident weights excluded)
  uint64_t load_bytes = 0;        // read to make weights resident
  uint64_t resident_bytes = 0;    // weights held for good
  uint64_t staging_bytes = 0;     // ring, caches
  const char* io_engine = "none";  // of the last reader opened: "io_uring" or "pread"
  bool io_direct = false;
  uint64_t hits = 0;
  uint64_t misses = 0;
  uint64_t pass_expert_bytes = 0;  // distinct experts that the last pass chose of the demand cache; may exceed its room
  double wait_seconds = 0;        // time acquire() stood waiting for the drive
  uint64_t experts_guessed = 0;        // read before their layer had chosen
  uint64_t experts_guessed_right = 0;  // and then chosen by it
  // Of the neuron window; its bytes and its waiting are in the sums above as well.
  uint64_t neurons_wanted = 0;
  uint64_t neuron_hits = 0;
  uint64_t neurons_passed_over = 0;  // would have been wanted as well, and were not worth a read
  uint64_t neuron_bytes = 0;     // read from the drive
  uint64_t neuron_requests = 0;  // reads of one or more neighbours
  uint64_t neurons_expected = 0;      // read before they were wanted
  uint64_t neuron_expected_hits = 0;  // and then wanted
  double neuron_wait_seconds = 0;
};

class NeuronWindow;

// A whole weight that is acquired soon, and how many rows of the batch it is for.
struct ExpectedWeight {
  WeightId weight = kNoWeight;
  int32_t n_rows = 1;
};

class WeightStore {
 public:
  virtual ~WeightStore() = default;
  // A hint that these rows come soon; may do nothing, never fails.
  virtual void prefetch(WeightId weight, RowSet rows) = 0;
  // Blocks until the bytes are here and checked. kDiskError, kCorrupt, kCancelled.
  // One thread acquires and drops leases; at most 8 are held at once, and none outlives the store. kOverBudget when the
  // leases held leave no room for this one; kBadArgument for a weight or row that is not there.
  virtual Result<Lease> acquire(WeightId weight, RowSet rows) = 0;
  // Whether a weight can be acquired.
  virtual bool has(WeightId) const { return true; }
  // Tiles of a matrix from `first` on, as many as come together: all of them, or, of a weight that streams through a ring
  // smaller than itself, the next part. Parts are acquired in order, each after the lease before it was dropped.
  virtual Result<TileLease> acquire_tiles(WeightId weight, int64_t first) {
    static_cast<void>(first);
    EDGE_ASSIGN(Lease lease, acquire(weight, {}));
    return TileLease{std::move(lease), TileLease::kAll};
  }
  // The weights of one layer that are acquired next, in any order: what is missing is read as far as there is room, and
  // none of them makes way for another. `n_rows` is the whole batch's. A hint as prefetch is.
  virtual void expect(std::span<const ExpectedWeight> weights, int64_t n_rows) {
    for (const ExpectedWeight& one : weights) prefetch(one.weight, {});
    static_cast<void>(n_rows);
  }
  // Which of some expected weights is best acquired now: one that is here, else the first to land. At least one weight.
  virtual size_t first_ready(std::span<const WeightId>) { return 0; }
  // How many layers ahead guesses reach.
  static constexpr int kGuessLayers = 2;
  // Whether to guess what the layer of `weight`, an expert's, will want that comes `distance` layers (1 to
  // kGuessLayers) after the one just expected: something of it may be missing, and the last such guesses were good.
  virtual bool guesses(WeightId weight, int distance) {
    static_cast<void>(weight), static_cast<void>(distance);
    return false;
  }
  // Weights of one layer that will probably be expected, the likeliest first; nearer layers first. What is missing is
  // read while nothing that is expected waits for the drive. A hint: a wrong guess costs a read.
  virtual void guess(std::span<const WeightId> weights, int distance) {
    static_cast<void>(weights), static_cast<void>(distance);
  }
  virtual StoreStats stats() const = 0;
  // Called after an abandoned pass so that streams start again at their first weight.
  virtual void rewind() {}
  // Rows of the pass that ended which stay in the text, in its order: caches learn from these alone.
  virtual void commit(std::span<const int32_t>) {}
  // Feed-forward layers by neuron; null where the pack has none.
  virtual NeuronWindow* neurons() { return nullptr; }
};

// Where each weight lives; decided by the plan, in Python, before anything is loaded.
enum class Placement : uint8_t {
  kResident = 0,  // read once, kept
  kStream = 1,    // read in order on every pass, through the ring
  kDemand = 2,    // read when acquired (embedding rows, experts), kept in a cache while there is room
  kNeurons = 3,   // records of neurons, some or all of them in the slots of the neuron window (kStream is for those that
                  // are all wanted in every pass)
  kUnused = 4,    // not read: what this way of running the model has no need of
};

struct StorePlan {
  std::vector<Placement> placement;  // per weight of the directory; blobs are ignored
  std::vector<WeightId> stream_order;  // the streamed weights in the order a pass acquires them
  // Staging of the stream: room for the leases held at once plus the largest streamed weight or part of one (its wrap
  // leaves a gap); what is above that is read-ahead.
  uint64_t ring_bytes = 0;
  // Cache of demand reads: room for the leases held at once, twice that where they differ in size (each lies in one
  // piece between the others). A whole weight takes its stored bytes, a row lease DemandCache::row_lease_bytes. Row
  // leases of streamed weights are taken from it too.
  uint64_t demand_bytes = 0;
  // Per weight of the directory, for those in kNeurons: how many of its records have a slot. May be empty when there
  // are none. All of them: read once, kept.
  std::vector<int64_t> neuron_slots;
  // Where records that are read on demand land: NeuronWindow::staging_least_bytes at least; more lets more reads fly.
  uint64_t neuron_staging_bytes = 0;
  // Slots and tables of the window in all, as the plan counted them; refused when it takes more.
  uint64_t neuron_bytes = 0;

  bool operator==(const StorePlan&) const = default;
};

// Read and written by other threads while the store loads.
struct LoadProgress {
  std::atomic<uint64_t> done_bytes{0};
  std::atomic<uint64_t> total_bytes{0};
  std::atomic<bool> cancel{false};  // the load ends with kCancelled
};

// Matrices of layers that stream come in parts of about this size: small against the ring, long against a read.
inline constexpr uint64_t kStreamPartBytes = 2 << 20;

struct StoreOptions {
  std::string io_engine = "auto";
  int io_depth = 0;  // requests in flight; 0: what suits a store's requests
  bool io_direct = true;
  uint64_t stream_part_bytes = kStreamPartBytes;
  std::string io_fault;              // FaultPlan of every reader; tests only
  // Layers ahead that experts are guessed for, at most WeightStore::kGuessLayers.
  int expert_guess_layers = WeightStore::kGuessLayers;
  // Whether experts are read while the store opens, as many as there is room for; else each when it is first wanted.
  bool fill_experts = false;
  float neuron_half_life_tokens = NeuronPolicy::kHalfLifeTokens;
  LoadProgress* progress = nullptr;  // must outlive open_store
};

}  // namespace edge
