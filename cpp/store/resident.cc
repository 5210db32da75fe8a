#include "store/resident.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "store/read_run.h"

namespace edge {
namespace {

// Warm = every byte is in the page cache already: copying beats the drive, and nothing new is cached.
bool warm(const std::string& path, const PackDirectory& directory, const std::vector<WeightId>& weights) {
  for (size_t i = 0; i < weights.size();) {
    const PackEntry& first = directory.entry(weights[i]);
    uint64_t end = first.offset;
    for (; i < weights.size() && directory.entry(weights[i]).offset == end; ++i) {
      end += directory.entry(weights[i]).stored_bytes;
    }
    if (!page_cached(path, first.offset, end - first.offset)) return false;
  }
  return !weights.empty();
}

// Makes the pages of a block from its end on, while what is read fills it from its beginning. The system clears every fresh
// page, which takes longer than reading it from a fast drive, and a direct read has that done by the thread that submits.
class Pages {
 public:
  Pages(std::byte* data, uint64_t bytes) : data_(data), left_(static_cast<int64_t>(bytes)) {
    if (bytes < kWorthwhileBytes) return;
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    for (int i = 0; i < std::min(cores - 1, kMostThreads); ++i) threads_.emplace_back([this] { make(); });
  }
  ~Pages() {
    left_ = 0;
    for (std::thread& thread : threads_) thread.join();
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

 private:
  static constexpr uint64_t kWorthwhileBytes = 64 << 20;
  static constexpr int64_t kPieceBytes = 8 << 20;
  static constexpr int kMostThreads = 3;

  void make() {
#ifdef MADV_POPULATE_WRITE
    for (;;) {
      const int64_t end = left_.fetch_sub(kPieceBytes), begin = std::max<int64_t>(end - kPieceBytes, 0);
      // Where the system does not know this, pages come as they are touched.
      if (end <= 0 || madvise(data_ + begin, static_cast<size_t>(end - begin), MADV_POPULATE_WRITE) != 0) return;
    }
#endif
  }

  std::byte* data_;
  std::atomic<int64_t> left_;
  std::vector<std::thread> threads_;
};

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
  const Status status = [&] {
    const Pages pages(memory_.data(), memory_.bytes());
    return read(path, missing, options);
  }();
  if (!status.ok()) {
    for (const WeightId weight : missing) data_[static_cast<size_t>(weight)] = nullptr;
    keep(weights);
    return status;
  }
  resident_bytes_ = total_bytes;
  return {};
}

Status Resident::read(const std::string& path, const std::vector<WeightId>& weights, const StoreOptions& options) {
  ReaderOptions how = reader_options(options);
  if (how.direct && warm(path, directory_, weights)) {
    how.direct = false;
    how.keep_cache = true;
    // Copies out of the cache run in the thread that asks for them: the pool spreads them over the cores.
    if (how.engine == "auto") how.engine = "pread";
  }
  EDGE_ASSIGN(const std::unique_ptr<BlockReader> reader, open_reader(path, how));
  io_engine_ = reader->engine();
  io_direct_ = reader->direct();

  std::vector<ReadRun> flying(static_cast<size_t>(reader->depth()));
  std::vector<size_t> free_slots;
  for (size_t slot = 0; slot < flying.size(); ++slot) free_slots.push_back(slot);
  size_t next = 0;     // into weights
  uint64_t begin = 0;  // of that weight
  Status first;
  while (true) {
    if (first.ok() && options.progress != nullptr && options.progress->cancel) {
      first = error(Code::kCancelled, "%s: loading was cancelled", path.c_str());
    }
    while (first.ok() && next < weights.size() && !free_slots.empty()) {
      const size_t slot = free_slots.back();
      free_slots.pop_back();
      ReadRun& run = flying[slot] = ReadRun{};
      while (next < weights.size() &&
             extend_run(&run, directory_, weights[next], data_[static_cast<size_t>(weights[next])], &begin)) {
        ++next;
        begin = 0;
      }
      first = reader->submit(run.request(slot));
      if (!first.ok()) free_slots.push_back(slot);
    }
    if (free_slots.size() == flying.size()) return first;
    EDGE_ASSIGN(const ReadCompletion completion, reader->wait());
    const ReadRun& run = flying[completion.tag];
    if (first.ok()) first = completion.status.ok() ? check_run(run, directory_) : completion.status;
    load_bytes_ += run.bytes;
    if (options.progress != nullptr) options.progress->done_bytes += run.bytes;
    free_slots.push_back(completion.tag);
  }
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
