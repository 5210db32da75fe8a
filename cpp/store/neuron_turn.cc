// One layer's turn in the neuron window: which records are missing, their reads, and who gives up a slot for them.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "store/neuron_window.h"

namespace edge {
namespace {

using Clock = std::chrono::steady_clock;

// A request costs the drive about as long as reading this much more in a row (10 us at 1.6 GB/s): nearer neighbours are
// read together, with what lies between them.
constexpr uint64_t kGapBytes = 16 << 10;
// Long enough for the sequential rate when nearly everything is missing.
constexpr uint64_t kLongestRunBytes = 256 << 10;
// Records handed out at once, and the part of a ring if more are here: enough to share between threads, few enough that
// the next reads go on meanwhile, for the places of a group are free when it has been used.
constexpr uint64_t kGroupBytes = 128 << 10, kGroupShare = 4;
// Requests handed to the system at once: enough to save calls, few enough that the drive starts early.
constexpr size_t kBatch = 32;
// Guesses are made while so many of them are wanted afterwards; below that now and then, to see whether they still fail.
constexpr float kGoodGuesses = 0.5f, kGuessFade = 1.0f / 16;
constexpr uint64_t kTryAgain = 64;

}  // namespace

const NeuronWindow::Layer* NeuronWindow::find(WeightId weight) const {
  const bool known = weight >= 0 && static_cast<size_t>(weight) < layer_of_.size() &&
                     layer_of_[static_cast<size_t>(weight)] >= 0;
  return known ? &layers_[static_cast<size_t>(layer_of_[static_cast<size_t>(weight)])] : nullptr;
}

std::span<const int32_t> NeuronWindow::slots_of(WeightId weight) const {
  const Layer* const layer = find(weight);
  if (layer == nullptr || layer->is_whole()) return {};
  return {layer->slot_of, static_cast<size_t>(layer->n_neurons)};
}

void NeuronWindow::touch(Layer& layer, int32_t neuron, uint64_t rows) {
  if (layer.used_by[neuron] == 0) layer.touched[layer.n_touched++] = neuron;
  layer.used_by[neuron] |= rows != 0 ? rows : 1;
}

void NeuronWindow::pass_over(WeightId weight, int32_t neuron, uint64_t rows) {
  Layer* const layer = find(weight);
  if (layer == nullptr || layer->is_whole() || neuron < 0 || neuron >= layer->n_neurons) return;
  touch(*layer, neuron, rows);
  ++n_passed_over_;
}

Status NeuronWindow::check_order(const Layer& layer, std::span<const int32_t> neurons) {
  for (size_t i = 0; i < neurons.size(); ++i) {
    if (neurons[i] < 0 || neurons[i] >= layer.n_neurons || (i > 0 && neurons[i] <= neurons[i - 1])) {
      return error(Code::kBadArgument, "%s: expected neurons from 0 to %lld in ascending order, found %d",
                   layer.entry->name.c_str(), static_cast<long long>(layer.n_neurons) - 1, neurons[i]);
    }
  }
  return {};
}

Status NeuronWindow::want(WeightId weight, std::span<const int32_t> neurons, std::span<const uint64_t> rows,
                          const std::byte** found) {
  settle();
  if (layer_ != nullptr) abandon();
  Layer* const known = find(weight);
  if (known == nullptr || rows.size() != neurons.size()) {
    return error(Code::kBadArgument, "weight %d holds no neurons here, or the rows of some are missing", weight);
  }
  Layer& layer = *known;
  EDGE_TRY(check_order(layer, neurons));
  if (reader_ == nullptr) EDGE_TRY(open_reader_again());
  layer_ = &layer;
  handed_out_ = neurons.empty();
  ring_ = 1 - ring_;
  wanted_ = neurons;
  found_ = found;
  n_wanted_ += neurons.size();
  for (size_t i = 0; i < neurons.size(); ++i) {
    const int32_t neuron = neurons[i];
    int64_t slot = neuron;
    if (!layer.is_whole()) {
      touch(layer, neuron, rows[i]);
      slot = layer.slot_of[neuron];
    }
    found[i] = slot < 0 ? nullptr : layer.slots + static_cast<uint64_t>(slot) * layer.record_bytes;
    if (slot < 0) {
      const float worth = policy_.used(layer.key[neuron], n_committed_);
      misses_[n_misses_++] = {kNoRun, neuron, static_cast<int32_t>(i), -1, worth};
    }
  }
  n_hits_ += neurons.size() - n_misses_;
  match_guesses();
  give_slots(layer);
  return read_on();
}

Status NeuronWindow::want_whole(WeightId weight, size_t n_neurons) {
  EDGE_TRY(want(weight, {}, {}, nullptr));
  n_wanted_ += n_neurons;
  n_hits_ += n_neurons;
  return {};
}

void NeuronWindow::match_guesses() {
  if (guess_layer_ == layer_ && next_guess_ > 0) {
    size_t n_right = 0;
    for (size_t miss = 0, guess = 0; miss < n_misses_ && guess < next_guess_;) {
      const int32_t wanted = misses_[miss].neuron, guessed = guesses_[guess].neuron;
      if (wanted == guessed) {
        misses_[miss].run = guesses_[guess].run;
        ++run_of(misses_[miss].run).n_users;
        ++n_right;
      }
      miss += wanted <= guessed;
      guess += guessed <= wanted;
    }
    n_expected_ += next_guess_;
    n_expected_hits_ += n_right;
    guess_worth_ += kGuessFade * (static_cast<float>(n_right) / static_cast<float>(next_guess_) - guess_worth_);
  }
  for (Ring& ring : rings_) {
    for (Run& run : ring.runs) run.expected = false;
    free_front(ring);
  }
  guess_layer_ = nullptr;
  n_guesses_ = next_guess_ = 0;
}

bool NeuronWindow::expects(WeightId weight) {
  const Layer* const layer = find(weight);
  if (layer == nullptr || layer->is_whole()) return false;
  return guess_worth_ >= kGoodGuesses || n_asked_++ % kTryAgain == 0;
}

Status NeuronWindow::expect(WeightId weight, std::span<const int32_t> neurons) {
  Layer* const layer = find(weight);
  if (layer == nullptr || layer_ == nullptr || layer == layer_ || guess_layer_ != nullptr) {
    return error(Code::kBadArgument, "weight %d: expected a layer of neurons after the one that is wanted", weight);
  }
  EDGE_TRY(check_order(*layer, neurons));
  if (layer->is_whole()) return {};
  guess_layer_ = layer;
  for (const int32_t neuron : neurons) {
    if (layer->slot_of[neuron] < 0) guesses_[n_guesses_++] = {kNoRun, neuron};
  }
  return {};
}

void NeuronWindow::give_slots(Layer& layer) {
  if (n_misses_ == 0) return;
  // What this pass uses stays. Ties: of two neurons of equal worth the later one leaves, for a pack may be ordered by use.
  size_t n_leaving = 0;
  for (int32_t slot = 0; slot < layer.n_slots; ++slot) {
    const int32_t neuron = layer.held[slot];
    if (layer.used_by[neuron] == 0) leaving_[n_leaving++] = {layer.key[neuron], neuron};
  }
  const size_t n = std::min(n_misses_, n_leaving);
  const auto worth_less = [](const Leaving& a, const Leaving& b) {
    return a.worth != b.worth ? a.worth < b.worth : a.neuron > b.neuron;
  };
  std::nth_element(leaving_, leaving_ + n, leaving_ + n_leaving, worth_less);
  std::sort(leaving_, leaving_ + n, worth_less);
  for (size_t i = 0; i < n_misses_; ++i) by_worth_[i] = static_cast<int32_t>(i);
  std::sort(by_worth_, by_worth_ + n_misses_, [&](int32_t a, int32_t b) {
    return misses_[a].worth != misses_[b].worth ? misses_[a].worth > misses_[b].worth : a < b;
  });
  for (size_t i = 0; i < n; ++i) {
    Miss& miss = misses_[by_worth_[i]];
    if (miss.worth <= leaving_[i].worth) break;
    miss.slot = layer.slot_of[leaving_[i].neuron];
  }
}

const std::byte* NeuronWindow::staged(const Miss& miss) {
  const Run& run = run_of(miss.run);
  const uint64_t record = layer_->entry->offset + static_cast<uint64_t>(miss.neuron) * layer_->record_bytes;
  return rings_[miss.run & 1].data + run.at + (record - run.file_offset);
}

void NeuronWindow::settle() {
  for (; n_settled_ < n_taken_; ++n_settled_) {
    const Miss& miss = misses_[n_settled_];
    if (miss.slot >= 0) {
      Layer& layer = *layer_;
      std::memcpy(layer.slots + static_cast<uint64_t>(miss.slot) * layer.record_bytes, staged(miss),
                  layer.record_bytes);
      layer.slot_of[layer.held[miss.slot]] = -1;
      layer.slot_of[miss.neuron] = miss.slot;
      layer.held[miss.slot] = miss.neuron;
    }
    --run_of(miss.run).n_users;
  }
  for (Ring& ring : rings_) free_front(ring);
  if (handed_out_) {
    n_misses_ = next_miss_ = n_taken_ = n_settled_ = 0;
    layer_ = nullptr;
  }
}

void NeuronWindow::free_front(Ring& ring) {
  while (!ring.runs.empty()) {
    const Run& run = ring.runs.front();
    if (!run.landed || run.expected || run.n_users > 0) return;
    ring.runs.pop_front();
    ++ring.first;
  }
}

template <typename Record>
NeuronWindow::Run NeuronWindow::next_run(const Layer& layer, const Record* records, size_t n, uint64_t longest,
                                         uint64_t align, size_t* end) {
  const auto begin_of = [&](const Record& record) {
    return layer.entry->offset + static_cast<uint64_t>(record.neuron) * layer.record_bytes;
  };
  Run run;
  run.file_offset = begin_of(records[0]) / align * align;
  for (*end = 0; *end < n; ++*end) {
    if (records[*end].run != kNoRun) continue;  // expected, and right
    const uint64_t first = begin_of(records[*end]), last = round_up(first + layer.record_bytes, align);
    if (*end > 0 && (first > run.file_offset + run.bytes + kGapBytes || last - run.file_offset > longest)) break;
    run.bytes = last - run.file_offset;
  }
  return run;
}

std::optional<uint64_t> NeuronWindow::room(const Ring& ring, uint64_t bytes) {
  if (ring.runs.empty()) return bytes <= ring.bytes ? std::optional<uint64_t>(0) : std::nullopt;
  const uint64_t head = ring.runs.front().at, tail = ring.runs.back().at + ring.runs.back().bytes;
  if (ring.runs.back().at < head) return head - tail >= bytes ? std::optional(tail) : std::nullopt;
  if (ring.bytes - tail >= bytes) return tail;
  return head >= bytes ? std::optional<uint64_t>(0) : std::nullopt;
}

template <typename Record>
bool NeuronWindow::start(const Layer& layer, Record* records, size_t n, size_t* next, bool expected) {
  const uint64_t longest = std::min(kLongestRunBytes, rings_[ring_].bytes / 2);
  while (*next < n && batch_.size() < kBatch) {
    if (records[*next].run != kNoRun) {
      ++*next;
      continue;
    }
    if (n_flying_ >= static_cast<size_t>(reader_->depth())) return false;
    size_t n_records = 0;
    Run run = next_run(layer, records + *next, n - *next, longest, reader_->align(), &n_records);
    size_t into = ring_;
    std::optional<uint64_t> at = room(rings_[into], run.bytes);
    if (!at && !expected) {
      // What was expected of this turn is here or known to be wrong: its ring is as good, and more reads are in flight.
      into = 1 - ring_;
      at = room(rings_[into], run.bytes);
    }
    if (!at) return false;
    Ring& ring = rings_[into];
    run.at = *at;
    run.expected = expected;
    const auto tag = static_cast<int64_t>(2 * (ring.first + ring.runs.size()) + into);
    for (Record* record = records + *next; record < records + *next + n_records; ++record) {
      if (record->run != kNoRun) continue;
      record->run = tag;
      run.n_users += expected ? 0 : 1;
    }
    batch_.push_back({run.file_offset, run.bytes, ring.data + run.at, static_cast<uint64_t>(tag)});
    ring.runs.push_back(std::move(run));
    ++n_flying_;
    *next += n_records;
  }
  return *next == n;
}

Status NeuronWindow::read_on() {
  if (layer_ == nullptr) return {};
  for (bool full = true; full;) {
    batch_.clear();
    const bool all = start(*layer_, misses_, n_misses_, &next_miss_, false);
    if (all && guess_layer_ != nullptr) start(*guess_layer_, guesses_, n_guesses_, &next_guess_, true);
    if (batch_.empty()) return {};
    full = batch_.size() == kBatch;
    n_requests_ += batch_.size();
    const Status status = reader_->submit_all(batch_);
    if (!status.ok()) {
      // Some may have been taken: destroying the reader waits for them, the next turn opens another.
      reader_.reset();
      n_flying_ = 0;
      abandon();
      return status;
    }
  }
  return {};
}

Result<size_t> NeuronWindow::take() {
  settle();
  if (layer_ == nullptr) return error(Code::kBadArgument, "no neurons are wanted");
  const uint64_t most = rings_[ring_].bytes / kGroupShare, enough = std::min(kGroupBytes, most);
  Status status = read_on();
  for (uint64_t bytes = 0; status.ok() && n_taken_ < n_misses_;) {
    const Miss& miss = misses_[n_taken_];
    // What has no run yet gets its place when these have been used; what has landed need not wait for them.
    if (bytes > 0 && (miss.run == kNoRun || bytes > most || (bytes > enough && !run_of(miss.run).landed))) break;
    status = land(miss);
    bytes += layer_->record_bytes;
    n_taken_ += status.ok();
  }
  if (!status.ok()) {
    abandon();
    return status;
  }
  handed_out_ = n_taken_ == n_misses_;
  return handed_out_ ? wanted_.size() : static_cast<size_t>(misses_[n_taken_].index);
}

Status NeuronWindow::land(const Miss& miss) {
  if (miss.run == kNoRun || !run_of(miss.run).landed) {
    const Clock::time_point start = Clock::now();
    const auto depth = static_cast<size_t>(reader_->depth());
    const size_t refill_at = depth - std::min(kBatch, (depth + 1) / 2);
    while (miss.run == kNoRun || !run_of(miss.run).landed) {
      EDGE_TRY(wait_one());
      if (n_flying_ <= refill_at) EDGE_TRY(read_on());
    }
    wait_ns_ += static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
  }
  const Run& run = run_of(miss.run);
  if (!run.status.ok()) return run.status;
  const std::byte* record = staged(miss);
  EDGE_TRY(check_record(*layer_->entry, miss.neuron, record));
  found_[miss.index] = record;
  return {};
}

Status NeuronWindow::wait_one() {
  Result<ReadCompletion> completion = reader_->wait();
  if (!completion.ok()) {
    // The reader itself has broken down: destroying it waits for what is in flight, the next turn opens another.
    reader_.reset();
    n_flying_ = 0;
    return completion.status();
  }
  --n_flying_;
  const auto tag = static_cast<int64_t>(completion->tag);
  Run& run = run_of(tag);
  run.landed = true;
  run.status = std::move(completion->status);
  flash_bytes_ += run.bytes;
  free_front(rings_[tag & 1]);
  return {};
}

void NeuronWindow::abandon() {
  while (n_flying_ > 0) (void)wait_one();
  for (Ring& ring : rings_) {
    ring.first += ring.runs.size();
    ring.runs.clear();
  }
  n_misses_ = next_miss_ = n_taken_ = n_settled_ = 0;
  guess_layer_ = nullptr;
  n_guesses_ = next_guess_ = 0;
  handed_out_ = false;
  layer_ = nullptr;
}

}  // namespace edge
