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
// Records handed out at once: enough to share between threads, few enough that the next reads go on meanwhile.
constexpr uint64_t kGroupBytes = 128 << 10;

}  // namespace

Status NeuronWindow::want(WeightId weight, std::span<const int32_t> neurons, std::span<const uint64_t> rows,
                          const std::byte** found) {
  settle();
  if (layer_ != nullptr) abandon();
  const bool known = weight >= 0 && static_cast<size_t>(weight) < layer_of_.size() &&
                     layer_of_[static_cast<size_t>(weight)] >= 0;
  if (!known || rows.size() != neurons.size()) {
    return error(Code::kBadArgument, "weight %d holds no neurons here, or the rows of some are missing", weight);
  }
  Layer& layer = layers_[static_cast<size_t>(layer_of_[static_cast<size_t>(weight)])];
  for (size_t i = 0; i < neurons.size(); ++i) {
    if (neurons[i] < 0 || neurons[i] >= layer.n_neurons || (i > 0 && neurons[i] <= neurons[i - 1])) {
      return error(Code::kBadArgument, "%s: expected neurons from 0 to %lld in ascending order, found %d",
                   layer.entry->name.c_str(), static_cast<long long>(layer.n_neurons) - 1, neurons[i]);
    }
  }
  if (reader_ == nullptr) EDGE_TRY(open_reader_again());
  layer_ = &layer;
  handed_out_ = false;
  wanted_ = neurons;
  found_ = found;
  n_wanted_ += neurons.size();
  for (size_t i = 0; i < neurons.size(); ++i) {
    const int32_t neuron = neurons[i];
    int64_t slot = neuron;
    if (!layer.is_whole()) {
      if (layer.used_by[neuron] == 0) layer.touched[layer.n_touched++] = neuron;
      layer.used_by[neuron] |= rows[i] != 0 ? rows[i] : 1;
      slot = layer.slot_of[neuron];
    }
    found[i] = slot < 0 ? nullptr : layer.slots + static_cast<uint64_t>(slot) * layer.record_bytes;
    if (slot < 0) {
      misses_[n_misses_++] = {static_cast<int32_t>(i), neuron, -1, policy_.used(layer.key[neuron], n_committed_)};
    }
  }
  n_hits_ += neurons.size() - n_misses_;
  give_slots(layer);
  return pump();
}

void NeuronWindow::give_slots(Layer& layer) {
  if (n_misses_ == 0) return;
  // What this pass uses stays. Ties: of two neurons of equal worth the later one leaves, for a pack may be ordered by use.
  size_t n_leaving = 0;
  for (int32_t slot = 0; slot < layer.n_slots; ++slot) {
    if (layer.used_by[layer.held[slot]] == 0) leaving_[n_leaving++] = slot;
  }
  const size_t n = std::min(n_misses_, n_leaving);
  const auto worth_less = [&](int32_t a, int32_t b) {
    const int32_t x = layer.held[a], y = layer.held[b];
    return layer.key[x] != layer.key[y] ? layer.key[x] < layer.key[y] : x > y;
  };
  std::nth_element(leaving_, leaving_ + n, leaving_ + n_leaving, worth_less);
  std::sort(leaving_, leaving_ + n, worth_less);
  for (size_t i = 0; i < n_misses_; ++i) by_worth_[i] = static_cast<int32_t>(i);
  std::sort(by_worth_, by_worth_ + n_misses_, [&](int32_t a, int32_t b) {
    return misses_[a].worth != misses_[b].worth ? misses_[a].worth > misses_[b].worth : a < b;
  });
  for (size_t i = 0; i < n; ++i) {
    Miss& miss = misses_[by_worth_[i]];
    if (miss.worth <= layer.key[layer.held[leaving_[i]]]) break;
    miss.slot = leaving_[i];
  }
}

const std::byte* NeuronWindow::staged(const Run& run, const Miss& miss) const {
  const uint64_t record = layer_->entry->offset + static_cast<uint64_t>(miss.neuron) * layer_->record_bytes;
  return staging_.data() + run.at + (record - run.file_offset);
}

void NeuronWindow::settle() {
  for (; n_taken_ > 0; --n_taken_, ++first_run_) {
    const Run& run = runs_.front();
    for (size_t i = run.first; i < run.end; ++i) {
      const Miss& miss = misses_[i];
      if (miss.slot < 0) continue;
      Layer& layer = *layer_;
      std::memcpy(layer.slots + static_cast<uint64_t>(miss.slot) * layer.record_bytes, staged(run, miss),
                  layer.record_bytes);
      layer.slot_of[layer.held[miss.slot]] = -1;
      layer.slot_of[miss.neuron] = miss.slot;
      layer.held[miss.slot] = miss.neuron;
    }
    runs_.pop_front();
  }
  if (runs_.empty() && next_miss_ == n_misses_) {
    n_misses_ = next_miss_ = 0;
    if (handed_out_) layer_ = nullptr;
  }
}

NeuronWindow::Run NeuronWindow::next_run() const {
  const uint64_t longest = std::min(kLongestRunBytes, staging_.bytes() / 2);
  const auto begin_of = [&](size_t i) {
    return layer_->entry->offset + static_cast<uint64_t>(misses_[i].neuron) * layer_->record_bytes;
  };
  Run run;
  run.first = next_miss_;
  run.file_offset = begin_of(next_miss_) / kReadAlign * kReadAlign;
  for (run.end = next_miss_; run.end < n_misses_; ++run.end) {
    const uint64_t begin = begin_of(run.end), end = round_up(begin + layer_->record_bytes, kReadAlign);
    const bool first = run.end == run.first;
    if (!first && (begin > run.file_offset + run.bytes + kGapBytes || end - run.file_offset > longest)) break;
    run.bytes = end - run.file_offset;
  }
  return run;
}

std::optional<uint64_t> NeuronWindow::room(uint64_t bytes) const {
  const uint64_t size = staging_.bytes();
  if (runs_.empty()) return bytes <= size ? std::optional<uint64_t>(0) : std::nullopt;
  const uint64_t head = runs_.front().at, tail = runs_.back().at + runs_.back().bytes;
  if (runs_.back().at < head) return head - tail >= bytes ? std::optional(tail) : std::nullopt;
  if (size - tail >= bytes) return tail;
  return head >= bytes ? std::optional<uint64_t>(0) : std::nullopt;
}

Status NeuronWindow::pump() {
  while (next_miss_ < n_misses_ && n_flying_ < static_cast<size_t>(reader_->depth())) {
    Run run = next_run();
    const std::optional<uint64_t> at = room(run.bytes);
    if (!at) return {};
    run.at = *at;
    const Status status = reader_->submit({run.file_offset, run.bytes, staging_.data() + run.at,
                                           first_run_ + runs_.size()});
    if (!status.ok()) {
      abandon();
      return status;
    }
    ++n_flying_;
    ++n_requests_;
    next_miss_ = run.end;
    runs_.push_back(run);
  }
  return {};
}

Result<size_t> NeuronWindow::take() {
  settle();
  if (layer_ == nullptr) return error(Code::kBadArgument, "no neurons are wanted");
  EDGE_TRY(pump());
  const uint64_t enough = std::min(kGroupBytes, staging_.bytes() / 4);
  uint64_t bytes = 0;
  while (n_taken_ < runs_.size() && bytes <= enough) {
    Status status;
    if (!runs_[n_taken_].landed) {
      const Clock::time_point start = Clock::now();
      while (status.ok() && !runs_[n_taken_].landed) status = wait_one();
      wait_ns_ += static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
    }
    if (status.ok()) status = land(runs_[n_taken_]);
    if (!status.ok()) {
      abandon();
      return status;
    }
    bytes += runs_[n_taken_++].bytes;
  }
  const size_t next = n_taken_ > 0 ? runs_[n_taken_ - 1].end : next_miss_;
  handed_out_ = next == n_misses_;
  return handed_out_ ? wanted_.size() : static_cast<size_t>(misses_[next].index);
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
  Run& run = runs_[completion->tag - first_run_];
  run.landed = true;
  flash_bytes_ += run.bytes;
  return completion->status;
}

Status NeuronWindow::land(const Run& run) {
  for (size_t i = run.first; i < run.end; ++i) {
    const std::byte* record = staged(run, misses_[i]);
    EDGE_TRY(check_record(*layer_->entry, misses_[i].neuron, record));
    found_[misses_[i].index] = record;
  }
  return {};
}

void NeuronWindow::abandon() {
  while (n_flying_ > 0) (void)wait_one();
  first_run_ += runs_.size();
  runs_.clear();
  n_taken_ = n_misses_ = next_miss_ = 0;
  handed_out_ = false;
  layer_ = nullptr;
}

}  // namespace edge
