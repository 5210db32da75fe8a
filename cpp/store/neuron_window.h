// Records of neurons ("LLM in a flash", arXiv 2312.11514, section 3): some of each layer's have a slot in memory, chosen
// by what the text uses; the others are read when a token wants them, neighbours together, several reads in flight.
//
// A pass over one layer: want() names the neurons of all its rows, in order, and starts the reads; take() hands them out
// in that order, in groups, while later reads are on their way. A record is used where it landed; if it earns a slot
// it is copied there afterwards, over the record that is worth least (slots are reached by pointer, so nothing has to
// move up when one leaves). expect() names what the layer after will probably want: it is read behind what is wanted
// now, while attention computes.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/budget.h"
#include "io/block_reader.h"
#include "store/neuron_policy.h"
#include "store/weight_store.h"

namespace edge {

class NeuronWindow {
 public:
  // Reserves everything; load() reads. kBadArgument when the plan does not fit the directory, kOverBudget.
  // The directory and the budget must outlive the window.
  static Result<std::unique_ptr<NeuronWindow>> open(const std::string& path, const PackDirectory& directory,
                                                    const StorePlan& plan, const StoreOptions& options,
                                                    Budget& budget);
  ~NeuronWindow();

  // Fills the slots with the first records of each entry: all of them where all have a slot.
  Status load(LoadProgress* progress);
  uint64_t load_bytes() const { return load_bytes_; }

  // Slots and tables of a plan, staging not included; and the least staging that one record needs (twice: one is used
  // while the next arrives).
  static uint64_t plan_bytes(const PackDirectory& directory, const StorePlan& plan);
  static uint64_t staging_least_bytes(const PackEntry& entry);

  // Every record of an entry, one after the other, where all have a slot; null where not.
  const std::byte* whole(WeightId weight) const;

  // Starts on `neurons` (ascending) of an entry in kNeurons. rows[i] has a bit for each row of the batch that uses
  // neurons[i] (row modulo 64). found[i] becomes the record where it has a slot, null where it is being read.
  // Ends the turn of the layer before. kBadArgument, kDiskError.
  Status want(WeightId weight, std::span<const int32_t> neurons, std::span<const uint64_t> rows,
              const std::byte** found);
  // want() of an entry that is whole(), by number: the records are where they always are.
  Status want_whole(WeightId weight, size_t n_neurons);
  // A guess of what the next want() asks, of `weight` (ascending): read_on() and take() read what is missing as far as
  // there is room. It changes no answer; a wrong guess costs a read. kBadArgument.
  Status expect(WeightId weight, std::span<const int32_t> neurons);
  // Hands reads to the drive while there is room for them: what is wanted, then what is expected. That takes some
  // microseconds of a thread for each (always the same thread in a turn). kDiskError (of the engine, not of a guess).
  Status read_on();
  // The slot of each neuron, -1: none; empty where all have theirs.
  std::span<const int32_t> slots_of(WeightId weight) const;
  // Says that rows (as in want()) would use a neuron of an entry in kNeurons and go without, for it has no slot: it earns
  // worth all the same, so that what is often passed over gets a slot once it is read.
  void pass_over(WeightId weight, int32_t neuron, uint64_t rows);
  // Whether a guess of this weight is worth making: it does not have all its slots, and the last guesses were good.
  bool expects(WeightId weight);
  // Waits for the next group: fills `found` up to the index it returns. Records of the group before may go, except
  // those with a slot. Returns the number of neurons when all have been handed out.
  // After an error (kDiskError, kCorrupt with layer and neuron) nothing is wanted and the slots are intact.
  Result<size_t> take();

  // The batch rows that stay in the text, in its order: what they used gains worth, what only others used does not.
  void commit(std::span<const int32_t> path);
  // Forgets what was used since the last commit, and what is being read.
  void rollback();

  void add_stats(StoreStats* stats) const;

 private:
  struct Layer {
    WeightId weight = kNoWeight;
    const PackEntry* entry = nullptr;
    uint64_t record_bytes = 0;
    int64_t n_neurons = 0;
    int64_t n_slots = 0;
    std::byte* slots = nullptr;  // [n_slots][record_bytes]
    // Only where not every record has a slot:
    int32_t* slot_of = nullptr;   // [n_neurons], -1: none
    int32_t* held = nullptr;      // [n_slots], the neuron in each
    float* key = nullptr;         // [n_neurons], of the policy
    uint64_t* used_by = nullptr;  // [n_neurons], batch rows since the last commit
    int32_t* touched = nullptr;   // [n_neurons], those with bits in used_by
    int64_t n_touched = 0;
    bool is_whole() const { return n_slots == n_neurons; }
  };
  // One request, of neighbouring records. It keeps its place while it flies, is expected, or somebody uses it.
  struct Run {
    uint64_t file_offset = 0;
    uint64_t bytes = 0;
    uint64_t at = 0;  // in the staging of its ring
    int64_t n_users = 0;
    bool expected = false;
    bool landed = false;
    Status status;
  };
  // Half of the staging: runs follow each other, oldest first, each in one piece. A turn reads what it wants and then
  // what it expects into one ring, while it uses what was expected of it from the other: so neither waits for the
  // other's places. What is wanted and finds no place in the first takes one in the second.
  struct Ring {
    std::byte* data = nullptr;
    uint64_t bytes = 0;
    std::deque<Run> runs;
    uint64_t first = 0;  // number of runs.front()
  };
  static constexpr int64_t kNoRun = -1;  // else 2 * number + ring, which is also the tag of its read
  struct Miss {
    int64_t run = kNoRun;
    int32_t neuron = 0;
    int32_t index = 0;  // into the wanted neurons
    int32_t slot = -1;  // it will be copied there
    float worth = 0;    // its key, should this use stay in the text
  };
  // Of a neuron with a slot; its key stands beside it, for tables of all neurons are slow to walk in any order.
  struct Leaving {
    float worth = 0;
    int32_t neuron = 0;
  };
  struct Guess {
    int64_t run = kNoRun;
    int32_t neuron = 0;
  };

  NeuronWindow(std::string path, const PackDirectory& directory, const StoreOptions& options);

  Status reserve(const StorePlan& plan, Budget& budget);
  Status load_layer(Layer& layer, LoadProgress* progress);
  Status open_reader_again();
  void give_slots(Layer& layer);
  const Layer* find(WeightId weight) const;
  Layer* find(WeightId weight) { return const_cast<Layer*>(std::as_const(*this).find(weight)); }
  static void touch(Layer& layer, int32_t neuron, uint64_t rows);
  static Status check_order(const Layer& layer, std::span<const int32_t> neurons);
  // Uses what was expected of this turn, and lets go of the rest.
  void match_guesses();
  Run& run_of(int64_t run) { return rings_[run & 1].runs[static_cast<uint64_t>(run >> 1) - rings_[run & 1].first]; }
  // Where the record of a miss has landed.
  const std::byte* staged(const Miss& miss);
  // Copies the records of the last group that earned a slot, and frees where they landed.
  void settle();
  // The same for some records [*next, n) of a layer; false when some are left.
  template <typename Record>
  bool start(const Layer& layer, Record* records, size_t n, size_t* next, bool expected);
  template <typename Record>
  static Run next_run(const Layer& layer, const Record* records, size_t n, uint64_t longest, uint64_t align,
                      size_t* end);
  static std::optional<uint64_t> room(const Ring& ring, uint64_t bytes);
  static void free_front(Ring& ring);
  Status wait_one();
  // Waits for a miss, checks its record and shows it to the caller.
  Status land(const Miss& miss);
  Status check_record(const PackEntry& entry, int64_t neuron, const std::byte* record) const;
  void abandon();

  const std::string path_;
  const PackDirectory& directory_;
  const StoreOptions options_;
  const NeuronPolicy policy_;
  Block slots_, tables_, staging_;
  std::vector<Layer> layers_;
  std::vector<int32_t> layer_of_;  // per weight of the directory, -1: not here
  int64_t n_committed_ = 0;        // tokens, the policy's clock
  uint64_t load_bytes_ = 0;

  // The turn of one layer.
  Layer* layer_ = nullptr;
  std::span<const int32_t> wanted_;
  const std::byte** found_ = nullptr;
  // In tables_: [most neurons] three times, [most slots].
  Miss* misses_ = nullptr;
  Guess* guesses_ = nullptr;
  int32_t* by_worth_ = nullptr;
  Leaving* leaving_ = nullptr;
  size_t n_misses_ = 0;
  size_t next_miss_ = 0;      // those before have a run
  size_t n_taken_ = 0;        // those before were handed out
  size_t n_settled_ = 0;      // those before are done with
  bool handed_out_ = false;   // the last group was the end

  std::array<Ring, 2> rings_;
  size_t ring_ = 0;           // where this turn reads to
  std::vector<ReadRequest> batch_;  // made and not yet submitted
  size_t n_flying_ = 0;       // those in batch_ included

  // What the next turn will probably want and has no slot for.
  Layer* guess_layer_ = nullptr;
  size_t n_guesses_ = 0;
  size_t next_guess_ = 0;     // those before have a run
  float guess_worth_ = 1;     // share of the guesses read that were wanted, of the last few turns
  uint64_t n_asked_ = 0;      // expects() while guesses were not worth it

  std::atomic<uint64_t> n_wanted_{0}, n_hits_{0}, n_passed_over_{0}, n_requests_{0}, flash_bytes_{0}, wait_ns_{0};
  std::atomic<uint64_t> n_expected_{0}, n_expected_hits_{0};
  std::unique_ptr<BlockReader> reader_;  // last: destroyed first, while what it reads into still stands
};

}  // namespace edge
