#include "store/layer_stream.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace edge {
namespace {
unsigned long long ull(uint64_t value) { return value; }
}  // namespace

Result<Block> LayerStream::reserve_ring(const PackDirectory& directory, const StorePlan& plan,
                                        const StoreOptions& options, Budget& budget) {
  const uint64_t ring_bytes = plan.ring_bytes / kReadAlign * kReadAlign;
  for (const WeightId weight : plan.stream_order) {
    for (const StreamPart& part : stream_parts(directory, weight, options.stream_part_bytes)) {
      if (part.room_bytes() <= ring_bytes) continue;
      return error(Code::kBadArgument, "store plan: %s needs %llu bytes, the stream ring has %llu",
                   directory.entry(weight).name.c_str(), ull(part.room_bytes()), ull(ring_bytes));
    }
  }
  return budget.reserve(ring_bytes, "stream ring");
}

LayerStream::LayerStream(const PackDirectory& directory, std::vector<StreamPart> parts, Block ring)
    : directory_(directory),
      parts_(std::move(parts)),
      index_(directory.entries().size(), -1),
      ring_(std::move(ring)),
      ring_bytes_(ring_.bytes()) {
  uint64_t longest = 0;
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (parts_[i].begin == 0) index_[static_cast<size_t>(parts_[i].weight)] = static_cast<int64_t>(i);
    longest = std::max(longest, parts_[i].fragment_bytes);
  }
  carry_.resize(longest);
}

Result<std::unique_ptr<LayerStream>> LayerStream::open(const std::string& path, const PackDirectory& directory,
                                                       std::vector<WeightId> order, Block ring,
                                                       const StoreOptions& options) {
  std::vector<StreamPart> parts;
  for (const WeightId weight : order) {
    const std::vector<StreamPart> of_one = stream_parts(directory, weight, options.stream_part_bytes);
    parts.insert(parts.end(), of_one.begin(), of_one.end());
  }
  std::unique_ptr<LayerStream> store(new LayerStream(directory, std::move(parts), std::move(ring)));
  EDGE_ASSIGN(store->reader_, open_reader(path, reader_options(options)));
  store->stats_.staging_bytes = store->ring_bytes_;
  store->stats_.io_engine = store->reader_->engine();
  store->stats_.io_direct = store->reader_->direct();
  store->thread_ = std::thread([stream = store.get()] { stream->read(); });
  return store;
}

LayerStream::~LayerStream() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  space_.notify_all();
  thread_.join();
  reader_.reset();  // waits for what is in flight
}

void LayerStream::read() {
  std::vector<Flight> flights(static_cast<size_t>(reader_->depth()));
  std::vector<size_t> free_flights;
  for (size_t i = 0; i < flights.size(); ++i) free_flights.push_back(i);
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (!free_flights.empty() && cut(&flights[free_flights.back()])) {
      const size_t tag = free_flights.back();
      free_flights.pop_back();
      lock.unlock();
      const Status submitted = reader_->submit(flights[tag].run.request(tag));
      lock.lock();
      if (submitted.ok()) continue;
      free_flights.push_back(tag);
      check(&flights[tag], submitted);
      land(&flights[tag]);
    } else if (n_flying_ > 0) {
      lock.unlock();
      const Result<ReadCompletion> completion = reader_->wait();
      if (completion.ok()) check(&flights[completion->tag], completion->status);
      lock.lock();
      if (!completion.ok()) {
        broken_ = completion.status();
        ready_.notify_all();
        return;
      }
      free_flights.push_back(completion->tag);
      land(&flights[completion->tag]);
    } else {
      starved_ = true;
      ready_.notify_all();
      space_.wait(lock, [this] { return stop_ || !starved_; });
    }
  }
}

LayerStream::Slot* LayerStream::next_slot() {
  if (issuing_ != nullptr) return issuing_;
  auto slot = std::make_unique<Slot>();
  slot->position = issue_position_++;
  slot->part = &parts_[slot->position % parts_.size()];
  slot->issued = slot->part->begin;
  const uint64_t bytes = slot->part->room_bytes();
  // A part lies in one piece: what would straddle the end begins again at the start.
  if (head_ % ring_bytes_ + bytes > ring_bytes_) head_ = round_up(head_, ring_bytes_);
  slot->begin = head_;
  slot->end = head_ += bytes;
  slots_.push_back(std::move(slot));
  return issuing_ = slots_.back().get();
}

// The next read, as long as the ring has room for it; false when it has none.
bool LayerStream::cut(Flight* flight) {
  flight->run = ReadRun{};
  flight->slots.clear();
  for (;;) {
    Slot* const slot = next_slot();
    const uint64_t tail = slots_.front()->begin;
    const uint64_t limit = tail + ring_bytes_;
    const uint64_t at = slot->begin + slot->part->lead_bytes() + slot->issued - slot->part->begin;
    const size_t n_spans = flight->run.spans.size();
    extend_run(&flight->run, directory_, slot->part->weight, weight_memory(*slot), &slot->issued,
               std::min(slot->part->end - slot->issued, at < limit ? limit - at : 0));
    const bool whole = slot->issued == slot->part->end;
    if (flight->run.spans.size() > n_spans) {
      flight->slots.push_back(slot);
      ++slot->n_flying;
    }
    if (!whole) break;
    issuing_ = nullptr;
  }
  if (flight->slots.empty()) return false;
  ++n_flying_;
  return true;
}

void LayerStream::check(Flight* flight, const Status& read) const {
  flight->statuses.clear();
  for (size_t i = 0; i < flight->slots.size(); ++i) {
    flight->statuses.push_back(read.ok() ? check_span(flight->run, i, directory_) : read);
  }
}

void LayerStream::land(Flight* flight) {
  --n_flying_;
  for (size_t i = 0; i < flight->slots.size(); ++i) {
    Slot* const slot = flight->slots[i];
    const ChunkSpan& span = flight->run.spans[i];
    --slot->n_flying;
    slot->landed_bytes += span.end - span.begin;
    if (slot->status.ok()) slot->status = std::move(flight->statuses[i]);
  }
  stats_.flash_bytes += flight->run.bytes;
  free_passed();
  ready_.notify_all();
}

LayerStream::Slot* LayerStream::slot_at(uint64_t position) {
  for (const auto& slot : slots_) {
    if (slot->position == position && !slot->passed) return slot.get();
  }
  return nullptr;
}

void LayerStream::free_passed() {
  bool any = false;
  while (!slots_.empty()) {
    const Slot& front = *slots_.front();
    if (!front.passed || front.n_leases > 0 || front.n_flying > 0) break;
    slots_.pop_front();
    any = true;
  }
  if (any) {
    starved_ = false;
    space_.notify_all();
  }
}

// Moves the consumer to `position`: what was read for earlier ones is dropped, what was read for later ones is kept.
// Backwards, everything from there on is read anew.
void LayerStream::seek(uint64_t position) {
  const bool backwards = position < next_position_;
  for (const auto& slot : slots_) {
    if (slot->position < position || backwards) slot->passed = true;
  }
  if (issuing_ != nullptr && issuing_->passed) issuing_ = nullptr;
  if (issue_position_ < position || backwards) issue_position_ = position;
  next_position_ = position;
  starved_ = false;
  free_passed();
  space_.notify_all();
}

Lease LayerStream::lease(Slot* slot) {
  ++slot->n_leases;
  return Lease(weight_memory(*slot), &directory_.entry(slot->part->weight), [this, slot] { release(slot); });
}

void LayerStream::release(Slot* slot) {
  std::lock_guard lock(mutex_);
  --slot->n_leases;
  free_passed();
}

Result<Lease> LayerStream::acquire(WeightId weight, RowSet) {
  EDGE_ASSIGN(TileLease all, acquire_tiles(weight, 0));
  const PackEntry& entry = directory_.entry(weight);
  if (all.end_tile < tiles_of(entry)) {
    return error(Code::kBadArgument, "%s streams in parts: expected to be asked for its tiles", entry.name.c_str());
  }
  return std::move(all.lease);
}

Result<TileLease> LayerStream::acquire_tiles(WeightId weight, int64_t first) {
  const bool known = weight >= 0 && static_cast<size_t>(weight) < index_.size();
  const int64_t begin = known ? index_[static_cast<size_t>(weight)] : -1;
  if (begin < 0) return error(Code::kBadArgument, "weight %d is not streamed", weight);
  auto index = static_cast<uint64_t>(begin);
  while (index < parts_.size() && parts_[index].weight == weight && parts_[index].end_tile <= first) ++index;
  std::unique_lock lock(mutex_);
  const bool asked_in_order = index == static_cast<uint64_t>(begin) || index == carry_index_;
  if (index == parts_.size() || parts_[index].weight != weight || parts_[index].first_tile != first || !asked_in_order) {
    return error(Code::kBadArgument, "%s: expected the tile after those leased last, found %lld",
                 directory_.entry(weight).name.c_str(), static_cast<long long>(first));
  }
  const StreamPart& part = parts_[index];
  for (const auto& slot : slots_) {
    if (slot->part == &part && slot->n_leases > 0) return TileLease{lease(slot.get()), part.end_tile};
  }
  EDGE_ASSIGN(Slot* const slot, wait_for(index, lock));
  std::byte* const memory = weight_memory(*slot);
  if (part.fragment_bytes > 0) {
    std::memcpy(memory + part.begin - part.fragment_bytes, carry_.data(), part.fragment_bytes);
  }
  const bool last = part.end == directory_.entry(weight).stored_bytes;
  carry_index_ = last ? 0 : index + 1;
  // What has no tiles has one part; parts of whole rows leave nothing to carry.
  if (const uint64_t carried = last ? 0 : parts_[index + 1].fragment_bytes; carried > 0) {
    const uint64_t tiles_bytes = static_cast<uint64_t>(part.end_tile) * row_tile_bytes(directory_.entry(weight));
    std::memcpy(carry_.data(), memory + tiles_bytes, carried);
  }
  return TileLease{lease(slot), part.end_tile};
}

Result<LayerStream::Slot*> LayerStream::wait_for(uint64_t index, std::unique_lock<std::mutex>& lock) {
  const uint64_t n = parts_.size();
  uint64_t position = next_position_ / n * n + index;
  if (position < next_position_) position += n;
  if (position != next_position_) seek(position);

  Slot* slot = slot_at(position);
  if (slot != nullptr && slot->ready()) {
    ++stats_.hits;
  } else {
    ++stats_.misses;
    const auto start = std::chrono::steady_clock::now();
    ready_.wait(lock, [&] {
      slot = slot_at(position);
      return (slot != nullptr && slot->ready()) || !broken_.ok() || starved_;
    });
    stats_.wait_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (slot != nullptr && slot->ready()) {
    if (!slot->status.ok()) {
      const Status status = slot->status;
      next_position_ = position + 1;
      seek(position);
      return status;
    }
    slot->passed = true;
    next_position_ = position + 1;
    return slot;
  }
  if (!broken_.ok()) return broken_;
  const StreamPart& part = parts_[index];
  return error(Code::kOverBudget, "%s: needs %llu bytes in a row, the stream ring has %llu and leases hold the rest",
               directory_.entry(part.weight).name.c_str(), ull(part.room_bytes()), ull(ring_bytes_));
}

void LayerStream::rewind() {
  std::lock_guard lock(mutex_);
  const uint64_t n = parts_.size();
  if (next_position_ % n != 0) seek(round_up(next_position_, n));
}

StoreStats LayerStream::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace edge
