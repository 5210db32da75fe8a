#include "store/resident.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "store/fill.h"
#include "store/fresh_pages.h"

namespace edge {
namespace {

// From how much on further threads help to load, and how many.
constexpr uint64_t kWorthwhileBytes = 16 << 20;
constexpr int kMostHelpers = 7;
// What one thread copies at a time: long enough that two of them rarely meet in a page of the cache.
constexpr uint64_t kStretchBytes = 8 << 20;

size_t helping_cores() {
  return static_cast<size_t>(std::clamp(static_cast<int>(std::thread::hardware_concurrency()) - 1, 0, kMostHelpers));
}

// Warm = the page cache has all, or all but what the system took from it on the side: copying beats the drive, and hardly
// anything new is cached.
bool warm(const std::string& path, const PackDirectory& directory, const std::vector<WeightId>& weights) {
  constexpr uint64_t kMissingOneIn = 16;
  uint64_t pages = 0, cached = 0;
  for (size_t i = 0; i < weights.size();) {
    const uint64_t begin = directory.entry(weights[i]).offset;
    uint64_t end = begin;
    for (; i < weights.size() && directory.entry(weights[i]).offset == end; ++i) {
      end += directory.entry(weights[i]).stored_bytes;
    }
    pages += pages_of(begin, end - begin);
    cached += cached_pages(path, begin, end - begin);
    if (cached == 0) return false;  // as every cold file is
  }
  return pages > 0 && pages - std::min(cached, pages) <= pages / kMissingOneIn;
}

}  // namespace

void Resident::keep(std::vector<WeightId> weights) {
  std::vector<bool> stays(data_.size());
  for (const WeightId weight : weights) stays[static_cast<size_t>(weight)] = true;
  uint64_t end = 0;
  for (size_t i = 0; i < data_.size(); ++i) {
    if (data_[i] == nullptr) continue;
    if (stays[i]) {
      const uint64_t bytes = directory_.entries()[i].stored_bytes;
      std::byte* const to = memory_.data() + end;
      if (to != data_[i]) std::memmove(to, data_[i], bytes);
      data_[i] = to;
      end += bytes;
    } else {
      data_[i] = nullptr;
    }
  }
  resident_bytes_ = end;
  if (end == 0) memory_.release();
  else if (!budget_.resize(&memory_, end).ok()) return;  // a shorter block is never refused
}

Status Resident::load(const std::string& path, std::vector<WeightId> weights, const StoreOptions& options) {
  keep(weights);
  std::sort(weights.begin(), weights.end());  // the directory is in file order
  std::vector<WeightId> missing;
  uint64_t total_bytes = 0, missing_bytes = 0;
  for (const WeightId weight : weights) {
    total_bytes += directory_.entry(weight).stored_bytes;
    if (data_[static_cast<size_t>(weight)] != nullptr) continue;
    missing.push_back(weight);
    missing_bytes += directory_.entry(weight).stored_bytes;
  }
  if (options.progress != nullptr) options.progress->total_bytes += missing_bytes;
  if (missing.empty()) return {};
  const std::byte* const before = memory_.data();
  if (before == nullptr) {
    EDGE_ASSIGN(memory_, budget_.reserve(total_bytes, "weights"));
  } else {
    EDGE_TRY(budget_.resize(&memory_, total_bytes));
  }
  // From the last one on: none is moved over another that has still to move.
  uint64_t end = total_bytes;
  for (size_t i = weights.size(); i-- > 0;) {
    const uint64_t bytes = directory_.entry(weights[i]).stored_bytes;
    end -= bytes;
    std::byte*& data = data_[static_cast<size_t>(weights[i])];
    std::byte* const to = memory_.data() + end;
    const std::byte* const from = data == nullptr ? to : memory_.data() + (data - before);
    if (to != from) std::memmove(to, from, bytes);
    data = to;
  }
  const Status status = read(path, missing, options);
  if (!status.ok()) {
    for (const WeightId weight : missing) data_[static_cast<size_t>(weight)] = nullptr;
    keep(weights);
    return status;
  }
  resident_bytes_ = total_bytes;
  return {};
}

Status Resident::read(const std::string& path, const std::vector<WeightId>& weights, const StoreOptions& options) {
  Fill fill(path, directory_, weights, data_, options.progress);
  ReaderOptions how = reader_options(options);
  const size_t n_helpers = memory_.bytes() < kWorthwhileBytes ? 0 : helping_cores();
  FreshPages pages(memory_.data(), memory_.bytes(), n_helpers, options.progress);
  const bool copies = how.direct && warm(path, directory_, weights);
  if (copies) {
    how.direct = false;
    how.keep_cache = true;
    // Out of the page cache each thread copies for itself: a queue would only hand the same work on.
    how.depth = 1;
    if (how.engine == "auto") how.engine = "pread";
  }
  std::vector<std::unique_ptr<BlockReader>> readers;
  while (readers.size() < 1 + (copies ? n_helpers : 0)) {
    EDGE_ASSIGN(std::unique_ptr<BlockReader> reader, open_reader(path, how));
    readers.push_back(std::move(reader));
  }
  io_engine_ = readers[0]->engine();
  io_direct_ = readers[0]->direct();
  if (copies && n_helpers > 0) pages.make();
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < readers.size(); ++i) helpers.emplace_back([&, i] { fill.load(*readers[i], kStretchBytes); });
  fill.load(*readers[0], copies ? kStretchBytes : kRunBytes);
  for (std::thread& helper : helpers) helper.join();
  load_bytes_ += fill.bytes();
  return fill.status();
}

Result<Lease> Resident::acquire(WeightId weight, RowSet rows) {
  const bool known = weight >= 0 && static_cast<size_t>(weight) < data_.size();
  const std::byte* data = known ? data_[static_cast<size_t>(weight)] : nullptr;
  if (data == nullptr) return error(Code::kBadArgument, "weight %d is not resident", weight);
  const PackEntry& entry = directory_.entry(weight);
  hits_.fetch_add(1, std::memory_order_relaxed);
  if (rows.empty() || !is_tile_format(entry.format)) return Lease(data, &entry);
  EDGE_TRY(check_rows(entry, rows));
  const uint64_t tile = row_tile_bytes(entry);
  const auto tile_of = [&](int32_t row) { return data + static_cast<uint64_t>(row / kTileRows) * tile; };
  if (rows.size() == 1) return Lease(tile_of(rows[0]), &entry);
  EDGE_ASSIGN(Block block, budget_.reserve(rows.size() * tile, "weights"));
  for (size_t i = 0; i < rows.size(); ++i) std::memcpy(block.data() + i * tile, tile_of(rows[i]), tile);
  auto gathered = std::make_shared<Block>(std::move(block));
  const std::byte* first = gathered->data();
  return Lease(first, &entry, [gathered]() mutable { gathered.reset(); });
}

StoreStats Resident::stats() const {
  StoreStats stats;
  stats.resident_bytes = resident_bytes_;
  stats.load_bytes = load_bytes_;
  stats.hits = hits_.load(std::memory_order_relaxed);
  stats.io_engine = io_engine_;
  stats.io_direct = io_direct_;
  return stats;
}

}  // namespace edge
