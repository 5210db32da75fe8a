#include "store/demand_cache.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace edge {
namespace {

using Clock = std::chrono::steady_clock;

unsigned long long ull(uint64_t value) { return value; }

// Adds the time it lives to a counter.
class WaitTimer {
 public:
  explicit WaitTimer(std::atomic<uint64_t>* total_ns) : total_ns_(total_ns) {}
  ~WaitTimer() { *total_ns_ += static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - start_).count()); }

 private:
  std::atomic<uint64_t>* total_ns_;
  Clock::time_point start_ = Clock::now();
};

// Whole chunks around the tiles that hold these rows, in file order, those that touch joined.
std::vector<ChunkSpan> row_spans(const PackEntry& entry, WeightId weight, RowSet rows) {
  const uint64_t tile_bytes = row_tile_bytes(entry);
  std::vector<ChunkSpan> spans;
  for (const int32_t row : rows) {
    const uint64_t first = static_cast<uint64_t>(row / kTileRows) * tile_bytes;
    spans.push_back({weight, first / entry.chunk_bytes * entry.chunk_bytes,
                     std::min(round_up(first + tile_bytes, entry.chunk_bytes), entry.stored_bytes)});
  }
  std::sort(spans.begin(), spans.end(), [](const ChunkSpan& a, const ChunkSpan& b) { return a.begin < b.begin; });
  size_t n = 0;
  for (const ChunkSpan& span : spans) {
    if (n > 0 && span.begin <= spans[n - 1].end) spans[n - 1].end = std::max(spans[n - 1].end, span.end);
    else spans[n++] = span;
  }
  spans.resize(n);
  return spans;
}

}  // namespace

Result<std::unique_ptr<DemandCache>> DemandCache::open(const std::string& path, const PackDirectory& directory,
                                                       uint64_t demand_bytes, const StoreOptions& options,
                                                       Budget& budget) {
  demand_bytes = round_up(std::max<uint64_t>(demand_bytes, 1), kReadAlign);
  std::unique_ptr<DemandCache> store(new DemandCache(directory, demand_bytes));
  EDGE_ASSIGN(store->memory_, budget.reserve(demand_bytes, "demand cache"));
  EDGE_ASSIGN(store->reader_, open_reader(path, reader_options(options)));
  store->flights_.resize(static_cast<size_t>(store->reader_->depth()));
  for (size_t slot = 0; slot < store->flights_.size(); ++slot) store->free_flights_.push_back(slot);
  return store;
}

DemandCache::~DemandCache() = default;

uint64_t DemandCache::row_lease_bytes(const PackEntry& entry, size_t n_rows) {
  const uint64_t tile = row_tile_bytes(entry);
  const uint64_t read = std::min(round_up(tile, entry.chunk_bytes) + entry.chunk_bytes, entry.stored_bytes);
  return std::min(n_rows * read, entry.stored_bytes) + (n_rows > 1 ? round_up(n_rows * tile, kReadAlign) : 0);
}

Status DemandCache::pump() {
  while (!queue_.empty() && !free_flights_.empty()) {
    Load* const load = queue_.front();
    const size_t slot = free_flights_.back();
    flights_[slot] = {load, std::move(load->waiting.front())};
    load->waiting.pop_front();
    if (load->waiting.empty()) queue_.pop_front();
    const Status submitted = reader_->submit(flights_[slot].run.request(slot));
    if (!submitted.ok()) {
      load->status = submitted;
      if (!load->waiting.empty()) queue_.pop_front();
      load->waiting.clear();
      return submitted;
    }
    free_flights_.pop_back();
    ++load->n_flying;
  }
  return {};
}

Status DemandCache::step() {
  EDGE_TRY(pump());
  EDGE_ASSIGN(const ReadCompletion completion, reader_->wait());
  Flight& flight = flights_[completion.tag];
  Load& load = *flight.load;
  --load.n_flying;
  free_flights_.push_back(completion.tag);
  flash_bytes_ += flight.run.bytes;
  if (load.status.ok()) load.status = completion.status.ok() ? check_run(flight.run, directory_) : completion.status;
  if (!load.status.ok() && !load.waiting.empty()) {
    std::erase(queue_, &load);
    load.waiting.clear();
  }
  return pump();
}

std::optional<DemandCache::Entries::iterator> DemandCache::victim(bool demanded) {
  std::optional<Entries::iterator> found;
  for (auto it = cached_.end(); it != cached_.begin();) {
    --it;
    if (it->n_leases > 0 || !it->load.landed()) continue;
    if (!it->wanted) return it;
    if (demanded && !found) found = it;
  }
  return found;
}

void DemandCache::drop(Entries::iterator cached) {
  pool_.give_back(cached->offset);
  by_weight_.erase(cached->weight);
  cached_.erase(cached);
}

Result<uint64_t> DemandCache::make_room(uint64_t bytes, const PackEntry& entry, bool demanded) {
  for (;;) {
    if (const auto offset = pool_.take(bytes)) return *offset;
    if (const auto old = victim(demanded)) {
      drop(*old);
    } else if (demanded && free_flights_.size() < flights_.size()) {
      EDGE_TRY(step());  // what is being fetched ahead can be dropped once it has landed
    } else {
      return error(Code::kOverBudget,
                   "%s: needs %llu bytes in a row, the demand cache has %llu and leases hold the rest",
                   entry.name.c_str(), ull(bytes), ull(memory_.bytes()));
    }
  }
}

Result<DemandCache::Entries::iterator> DemandCache::start(WeightId weight, bool demanded) {
  const PackEntry& entry = directory_.entry(weight);
  EDGE_ASSIGN(const uint64_t offset, make_room(entry.stored_bytes, entry, demanded));
  cached_.emplace_front();
  const auto cached = cached_.begin();
  cached->weight = weight;
  cached->offset = offset;
  by_weight_.emplace(weight, cached);
  for (uint64_t begin = 0; begin < entry.stored_bytes;) {
    ReadRun run;
    extend_run(&run, directory_, weight, memory_.data() + offset, &begin);
    cached->load.waiting.push_back(std::move(run));
  }
  if (demanded) queue_.push_front(&cached->load);
  else queue_.push_back(&cached->load);
  return cached;
}

void DemandCache::prefetch(WeightId weight, RowSet rows) {
  if (weight < 0 || static_cast<size_t>(weight) >= directory_.entries().size() || !rows.empty()) return;
  if (const auto known = by_weight_.find(weight); known != by_weight_.end()) {
    known->second->wanted = true;
    return;
  }
  // An error is told by the acquire that follows.
  if (start(weight, /*demanded=*/false).ok() && !pump().ok()) return;
}

Result<Lease> DemandCache::acquire(WeightId weight, RowSet rows) {
  if (weight < 0 || static_cast<size_t>(weight) >= directory_.entries().size()) {
    return error(Code::kBadArgument, "weight %d is not in the pack", weight);
  }
  if (!rows.empty() && is_tile_format(directory_.entry(weight).format)) return acquire_rows(weight, rows);
  return acquire_whole(weight);
}

Result<Lease> DemandCache::acquire_whole(WeightId weight) {
  const auto known = by_weight_.find(weight);
  Entries::iterator cached;
  if (known != by_weight_.end()) {
    cached = known->second;
  } else {
    WaitTimer timer(&wait_ns_);
    EDGE_ASSIGN(cached, start(weight, /*demanded=*/true));
  }
  if (cached->load.landed()) {
    ++hits_;
  } else {
    ++misses_;
    WaitTimer timer(&wait_ns_);
    // Demanded now: before what is fetched ahead.
    if (const auto queued = std::find(queue_.begin(), queue_.end(), &cached->load); queued != queue_.end()) {
      queue_.erase(queued);
      queue_.push_front(&cached->load);
    }
    while (!cached->load.landed()) EDGE_TRY(step());
  }
  if (!cached->load.status.ok()) {
    const Status status = cached->load.status;
    drop(cached);
    return status;
  }
  cached->wanted = false;
  cached_.splice(cached_.begin(), cached_, cached);
  ++cached->n_leases;
  return Lease(memory_.data() + cached->offset, &directory_.entry(weight), [cached] { --cached->n_leases; });
}

Result<Lease> DemandCache::acquire_rows(WeightId weight, RowSet rows) {
  const PackEntry& entry = directory_.entry(weight);
  EDGE_TRY(check_rows(entry, rows));
  const uint64_t tile_bytes = row_tile_bytes(entry);
  std::vector<ChunkSpan> spans = row_spans(entry, weight, rows);
  uint64_t read_bytes = 0;
  for (const ChunkSpan& span : spans) read_bytes += span.end - span.begin;

  ++misses_;
  WaitTimer timer(&wait_ns_);
  // One extent: the gathered tiles, when there are several, then the chunks they are taken from.
  const uint64_t gathered_bytes = rows.size() > 1 ? round_up(rows.size() * tile_bytes, kReadAlign) : 0;
  EDGE_ASSIGN(const uint64_t extent, make_room(gathered_bytes + read_bytes, entry, /*demanded=*/true));
  const uint64_t chunks = extent + gathered_bytes;
  // A node of its own: should the reader itself break down, reads still in flight keep a live target.
  const auto load = row_loads_.emplace(row_loads_.end());
  uint64_t at = chunks;
  for (const ChunkSpan& span : spans) {
    const uint64_t bytes = span.end - span.begin;
    load->waiting.push_back({entry.offset + span.begin, bytes, memory_.data() + at, {span}});
    at += bytes;
  }
  queue_.push_front(&*load);
  while (!load->landed()) EDGE_TRY(step());
  const Status status = load->status;
  row_loads_.erase(load);
  if (!status.ok()) {
    pool_.give_back(extent);
    return status;
  }
  // Where a tile lies among the chunks read: spans are sorted and tiles never straddle two of them.
  const auto tile_data = [&](int32_t row) {
    const uint64_t first = static_cast<uint64_t>(row / kTileRows) * tile_bytes;
    const std::byte* data = memory_.data() + chunks;
    for (const ChunkSpan& span : spans) {
      if (first < span.end) return data + (first - span.begin);
      data += span.end - span.begin;
    }
    return data;
  };
  const std::byte* data = tile_data(rows[0]);
  if (rows.size() > 1) {
    std::byte* const into = memory_.data() + extent;
    for (size_t i = 0; i < rows.size(); ++i) std::memcpy(into + i * tile_bytes, tile_data(rows[i]), tile_bytes);
    pool_.shrink(extent, gathered_bytes);
    data = into;
  }
  return Lease(data, &entry, [this, extent] { pool_.give_back(extent); });
}

StoreStats DemandCache::stats() const {
  StoreStats stats;
  stats.flash_bytes = flash_bytes_;
  stats.staging_bytes = memory_.bytes();
  stats.hits = hits_;
  stats.misses = misses_;
  stats.wait_seconds = 1e-9 * static_cast<double>(wait_ns_.load());
  stats.io_engine = reader_->engine();
  stats.io_direct = reader_->direct();
  return stats;
}

}  // namespace edge
