// Weights read when they are asked for: rows of an embedding, experts of a mixture. The weights of one expert are one
// record, read and dropped together; which records stay while there is no room for all is ExpertPolicy's to say.
// While nothing that is wanted waits, guesses of what layers ahead will want are read (demand_guess.cc).
// One block of memory; no thread of its own.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/budget.h"
#include "store/expert_policy.h"
#include "store/extent_pool.h"
#include "store/read_run.h"

namespace edge {

class DemandCache final : public WeightStore {
 public:
  // The directory and the budget must outlive the store.
  static Result<std::unique_ptr<DemandCache>> open(const std::string& path, const PackDirectory& directory,
                                                   uint64_t demand_bytes, const StoreOptions& options, Budget& budget);
  ~DemandCache() override;

  uint64_t bytes() const { return memory_.bytes(); }
  // Reads experts of these weights while there is room, the same ones of every layer, before anything is acquired. One that
  // cannot be read is left out, and tells why when it is wanted. kCancelled; `progress` may be null.
  Status fill(std::span<const WeightId> weights, LoadProgress* progress);
  // Less room, or more; what is worth most stays. No leases may be held. On error the cache is to be thrown away.
  Status resize(uint64_t demand_bytes, Budget& budget);

  // What a lease of `n_rows` rows takes at most while it is being read: the chunks its tiles touch, and the gathered
  // tiles when there are several.
  static uint64_t row_lease_bytes(const PackEntry& entry, size_t n_rows);

  // Whole weights: starts the read where room can be made without dropping what is expected and not yet used.
  // Rows: nothing; a row is one short read.
  void prefetch(WeightId weight, RowSet rows) override;
  Result<Lease> acquire(WeightId weight, RowSet rows) override;
  void expect(std::span<const ExpectedWeight> weights, int64_t n_rows) override;
  size_t first_ready(std::span<const WeightId> weights) override;
  bool guesses(WeightId weight, int distance) override;
  void guess(std::span<const WeightId> weights, int distance) override;
  // Takes what has landed and submits what waits; never blocks. To be called often while something is computed. An
  // error is the reader's own, and is told by what waits for it too.
  Status read_on();
  // A hit is an acquire that needed no read, a miss one whose bytes were read for it, waited for or not.
  StoreStats stats() const override;

 private:
  // Neighbours in the file that belong to one expert; else one weight.
  struct Record {
    WeightId first = kNoWeight;
    int n_weights = 0;
    uint64_t bytes = 0;
  };
  // Something being read into the pool.
  struct Load {
    std::vector<ReadRun> waiting;  // next at the back
    int n_flying = 0;              // those that landed and are not checked yet included
    bool parked = false;           // a guess that nobody wants yet: what waits is in no queue
    bool guessed = false;          // begun as one: where it failed it is read again, as long as nobody uses a part
    Status status;                 // of the reader: nothing of this load can be trusted
    std::vector<std::pair<WeightId, Status>> failures;  // of single weights
    WeightId first = kNoWeight;
    std::vector<uint64_t> missing_bytes;  // of each weight from `first` on, not read and checked yet
    bool landed() const { return n_flying == 0 && waiting.empty(); }
    bool has_first(size_t n) const {
      return std::all_of(missing_bytes.begin(), missing_bytes.begin() + static_cast<std::ptrdiff_t>(n),
                         [](uint64_t bytes) { return bytes == 0; });
    }
    bool has(WeightId weight) const { return landed() || missing_bytes[static_cast<size_t>(weight - first)] == 0; }
  };
  struct Cached {
    Record record;
    uint64_t offset = 0;  // in the pool
    int n_leases = 0;
    uint32_t unused = 0;       // bit i: weight i was read and not acquired yet
    uint64_t expectation = 0;  // equal to expectation_: expected now, not to make way for others
    uint64_t use = 0;          // equal to expectation_: acquired since, not to make way for guesses
    uint64_t guess = 0;        // above expectation_: guessed for a layer to come, makes way only for what is expected
    bool stale = false;        // dropped with its last lease
    Load load;
  };
  using Entries = std::list<Cached>;  // most recently used first
  struct Flight {
    Load* load = nullptr;
    ReadRun run;
    Status status;
  };
  struct Guess {
    Record record;
    int distance = 0;  // in layers
    int rank = 0;      // the likeliest of its layer is 0
  };
  static constexpr int kGuessRanks = 16;  // those after are counted with the last
  struct GuessWorth {
    std::array<float, kGuessRanks> right;  // by rank: share of the guesses read that were wanted, lately
    size_t n_ranks = 1;                    // that were ever named
    uint64_t n_asked = 0;
    bool trying = false;                   // all ranks now, to see whether they still fail
  };
  // How sure a record is to be used; what is surer takes the room of what is less so.
  enum class Need { kGuessed, kExpected, kDemanded };

  DemandCache(const PackDirectory& directory, uint64_t bytes, int guess_layers);

  Record record_of(WeightId weight) const;
  // The layer as the policy counts them; -1 for what is no expert.
  int policy_layer(WeightId weight) const;
  uint64_t extent_bytes(const Record& record) const;

  Result<Lease> acquire_whole(WeightId weight);
  Result<Lease> acquire_rows(WeightId weight, RowSet rows);
  Result<Entries::iterator> start(const Record& record, Need need);
  // Experts not here, in the order to be filled with; as many as free room holds.
  std::vector<Record> records_that_fit(std::span<const WeightId> weights) const;
  void start_expected();
  void to_front(Load* load);
  // Expected from here on: what is missing of it is in the queue.
  void want(Entries::iterator cached);
  // Waits for one weight of a record, or for all of it, first in the queue.
  Status land(Entries::iterator cached, WeightId weight);
  Status land(Entries::iterator cached);
  // The guess to read on with; null when there is none, or no room for one.
  Load* next_guess();
  // Requests in flight up to which this one is added.
  size_t most_flights(const Guess& guess);
  float& right(const Guess& guess) { return guess_worth_[guess.distance - 1u].right[static_cast<size_t>(guess.rank)]; }
  // Which guesses of a layer were right, now that it has chosen.
  void judge_guesses(int pack_layer, std::span<const ExpectedWeight> weights);
  void release(Entries::iterator cached);
  void drop(Entries::iterator cached);
  bool expected(const Cached& cached) const { return cached.expectation == expectation_; }
  bool kept(const Cached& cached) const { return expected(cached) || cached.guess > expectation_; }
  std::optional<Entries::iterator> victim(Need need);
  // Room for `bytes`, made by dropping records; kOverBudget when leases hold too much. Leaves `spare_bytes` where that
  // costs nothing that is expected.
  Result<uint64_t> make_room(uint64_t bytes, uint64_t spare_bytes, const PackEntry& entry, Need need);

  // Submits waiting runs while the reader takes them without blocking.
  Status pump();
  // Waits for one read, checks it and accounts for it. An error here is the reader's own; that of a read is its load's.
  Status step();
  void collect(ReadCompletion completion);
  // The hash of one run that has landed; of what is wanted first.
  void check_landed();
  size_t n_flying() const { return flights_.size() - free_flights_.size(); }
  bool reading() const { return n_flying() > 0 || !landed_.empty(); }

  const PackDirectory& directory_;
  Block memory_;
  ExtentPool pool_;
  Entries cached_;
  std::unordered_map<WeightId, Entries::iterator> by_first_;  // of the record's first weight
  std::list<Load> row_loads_;
  std::deque<Load*> queue_;  // loads with runs waiting, but for parked ones; demanded ones first
  std::deque<Guess> guesses_;        // of layers to come: not started, or with runs waiting; the next one first
  std::vector<Guess> guesses_read_;  // started, their layer has not chosen yet
  const int guess_layers_;
  std::array<GuessWorth, kGuessLayers> guess_worth_;  // by distance - 1
  std::deque<Flight> landed_;        // and not checked yet
  std::vector<Flight> flights_;
  std::vector<size_t> free_flights_;

  std::optional<ExpertPolicy> policy_;  // none where the pack's experts are no full grid of layers x experts
  std::vector<int> policy_layers_;      // by the pack's layer; -1 for those without experts
  uint64_t expert_bytes_ = 0;           // of the largest expert: each takes as much, so that any fits any gap
  uint64_t cached_bytes_ = 0;           // taken by records
  uint64_t row_bytes_ = 0;              // of the last row lease: the next one finds as much free
  uint64_t expectation_ = 1;
  std::deque<Record> expected_;  // not started yet
  int last_layer_ = -1;
  uint64_t pass_bytes_ = 0;

  std::atomic<uint64_t> load_bytes_{0};  // of what fill() read
  std::atomic<uint64_t> flash_bytes_{0}, hits_{0}, misses_{0}, wait_ns_{0}, pass_expert_bytes_{0};
  std::atomic<uint64_t> n_guessed_{0}, n_guessed_right_{0};
  std::unique_ptr<BlockReader> reader_;  // last: destroyed first, while what it reads into still stands
};

}  // namespace edge
