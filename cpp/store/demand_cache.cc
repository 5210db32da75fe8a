#include "store/demand_cache.h"

#include <algorithm>
#include <cstring>

#include "store/wait_timer.h"

namespace edge {
namespace {

unsigned long long ull(uint64_t value) { return value; }

constexpr int kMaxRecordWeights = 32;  // bits of Cached::unused
// Runs of 1 MiB in flight: what keeps a drive busy while something is computed, and lands early enough to be checked
// while the next ones fly.
constexpr int kDepth = 16;
// Share of right guesses that is believed in before any was made.
constexpr float kFirstGuesses = 0.9f;

}  // namespace

Result<std::unique_ptr<DemandCache>> DemandCache::open(const std::string& path, const PackDirectory& directory,
                                                       uint64_t demand_bytes, const StoreOptions& options,
                                                       Budget& budget) {
  demand_bytes = round_up(std::max<uint64_t>(demand_bytes, 1), kReadAlign);
  std::unique_ptr<DemandCache> store(new DemandCache(directory, demand_bytes, options.expert_guess_layers));
  EDGE_ASSIGN(store->memory_, budget.reserve(demand_bytes, "demand cache"));
  EDGE_ASSIGN(store->reader_, open_reader(path, reader_options(options, kDepth)));
  store->flights_.resize(static_cast<size_t>(store->reader_->depth()));
  for (size_t slot = 0; slot < store->flights_.size(); ++slot) store->free_flights_.push_back(slot);
  return store;
}

DemandCache::DemandCache(const PackDirectory& directory, uint64_t bytes, int guess_layers)
    : directory_(directory), pool_(bytes), guess_layers_(std::min(guess_layers, kGuessLayers)) {
  for (GuessWorth& worth : guess_worth_) worth.right.fill(kFirstGuesses);
  int n_experts = 0;
  size_t n_entries = 0;
  for (size_t i = 0; i < directory.entries().size(); ++i) {
    const PackEntry& entry = directory.entries()[i];
    if (entry.layer < 0 || entry.expert < 0) continue;
    n_experts = std::max(n_experts, entry.expert + 1);
    if (static_cast<size_t>(entry.layer) >= policy_layers_.size()) policy_layers_.resize(entry.layer + 1u, -1);
    policy_layers_[static_cast<size_t>(entry.layer)] = 0;
    expert_bytes_ = std::max(expert_bytes_, record_of(static_cast<WeightId>(i)).bytes);
    ++n_entries;
  }
  int n_layers = 0;
  for (int& layer : policy_layers_) {
    if (layer == 0) layer = n_layers++;
  }
  // Numbers out of a file: tables are made only where there are as many experts as they say.
  if (n_layers > 0 && static_cast<size_t>(n_layers) * static_cast<size_t>(n_experts) <= n_entries) {
    policy_.emplace(n_layers, n_experts);
  }
}

DemandCache::~DemandCache() = default;

Status DemandCache::resize(uint64_t demand_bytes, Budget& budget) {
  const uint64_t bytes = round_up(std::max<uint64_t>(demand_bytes, 1), kReadAlign);
  expected_.clear();
  guesses_.clear();
  while (reading() || !queue_.empty()) EDGE_TRY(step());
  // Where not even one expert fits, extents are counted differently.
  const bool same_extents = expert_bytes_ <= std::min(bytes, memory_.bytes());
  while (!cached_.empty() && (!same_extents || cached_bytes_ + row_bytes_ > bytes)) drop(*victim(Need::kDemanded));
  std::vector<Entries::iterator> behind;
  for (auto it = cached_.begin(); it != cached_.end(); ++it) {
    if (it->offset + extent_bytes(it->record) > bytes) behind.push_back(it);
  }
  // By offset: the one that lies across the new end moves first, before its place is taken.
  std::sort(behind.begin(), behind.end(), [](const auto& a, const auto& b) { return a->offset < b->offset; });
  for (const auto& it : behind) pool_.give_back(it->offset);
  pool_.resize(bytes);
  for (const auto& it : behind) {
    const auto offset = pool_.take(extent_bytes(it->record));
    if (offset) std::memmove(memory_.data() + *offset, memory_.data() + it->offset, it->record.bytes);
    it->offset = offset.value_or(UINT64_MAX);
    if (!offset) drop(it);
  }
  return budget.resize(&memory_, bytes);
}

DemandCache::Record DemandCache::record_of(WeightId weight) const {
  const PackEntry& entry = directory_.entry(weight);
  Record record{weight, 1, entry.stored_bytes};
  if (entry.layer < 0 || entry.expert < 0) return record;
  const auto joined = [&](WeightId a, WeightId b) {
    const PackEntry &one = directory_.entry(a), &two = directory_.entry(b);
    return one.layer == two.layer && one.expert == two.expert && one.offset + one.stored_bytes == two.offset &&
           one.format != WeightFormat::kBytes && two.format != WeightFormat::kBytes;
  };
  while (record.first > 0 && record.n_weights < kMaxRecordWeights && joined(record.first - 1, record.first)) {
    --record.first;
    ++record.n_weights;
    record.bytes += directory_.entry(record.first).stored_bytes;
  }
  const auto n = static_cast<WeightId>(directory_.entries().size());
  while (record.first + record.n_weights < n && record.n_weights < kMaxRecordWeights &&
         joined(record.first + record.n_weights - 1, record.first + record.n_weights)) {
    record.bytes += directory_.entry(record.first + record.n_weights).stored_bytes;
    ++record.n_weights;
  }
  return record;
}

int DemandCache::policy_layer(WeightId weight) const {
  const PackEntry& entry = directory_.entry(weight);
  return policy_ && entry.expert >= 0 && entry.layer >= 0 ? policy_layers_[static_cast<size_t>(entry.layer)] : -1;
}

uint64_t DemandCache::extent_bytes(const Record& record) const {
  if (directory_.entry(record.first).expert < 0 || expert_bytes_ > memory_.bytes()) return record.bytes;
  return std::max(record.bytes, expert_bytes_);
}

Status DemandCache::pump() {
  while (!free_flights_.empty()) {
    Load* const load = !queue_.empty() ? queue_.front() : next_guess();
    if (load == nullptr) break;
    const size_t slot = free_flights_.back();
    flights_[slot] = {load, std::move(load->waiting.back()), {}};
    load->waiting.pop_back();
    const Status submitted = reader_->submit(flights_[slot].run.request(slot));
    if (!submitted.ok()) {
      load->status = submitted;
      load->waiting.clear();
    }
    if (load->waiting.empty() && !load->parked) queue_.pop_front();
    if (!submitted.ok()) return submitted;
    free_flights_.pop_back();
    ++load->n_flying;
  }
  return {};
}

void DemandCache::collect(ReadCompletion completion) {
  landed_.push_back(std::move(flights_[completion.tag]));
  landed_.back().status = std::move(completion.status);
  free_flights_.push_back(completion.tag);
}

void DemandCache::check_landed() {
  const auto is_wanted = [](const Flight& one) { return !one.load->parked; };
  auto found = std::find_if(landed_.begin(), landed_.end(), is_wanted);
  if (found == landed_.end()) found = landed_.begin();
  const Flight flight = std::move(*found);
  landed_.erase(found);
  Load& load = *flight.load;
  --load.n_flying;
  flash_bytes_ += flight.run.bytes;
  for (size_t n = 0; n < flight.run.spans.size(); ++n) {
    const ChunkSpan& span = flight.run.spans[n];
    const Status status = flight.status.ok() ? check_span(flight.run, n, directory_) : flight.status;
    if (!status.ok()) load.failures.emplace_back(span.weight, status);
    if (load.first == kNoWeight) continue;
    load.missing_bytes[static_cast<size_t>(span.weight - load.first)] -= span.end - span.begin;
  }
  if (load.landed()) std::vector<ReadRun>().swap(load.waiting);
}

Status DemandCache::step() {
  EDGE_TRY(read_on());
  if (landed_.empty()) {
    EDGE_ASSIGN(ReadCompletion completion, reader_->wait());
    collect(std::move(completion));
    EDGE_TRY(read_on());  // they tend to land together
  }
  check_landed();
  return {};
}

Status DemandCache::read_on() {
  while (n_flying() > 0) {
    EDGE_ASSIGN(std::optional<ReadCompletion> completion, reader_->poll());
    if (!completion) break;
    collect(std::move(*completion));
  }
  return pump();
}

std::optional<DemandCache::Entries::iterator> DemandCache::victim(Need need) {
  std::optional<Entries::iterator> least, least_guessed, least_expected;
  double least_worth = 0;
  // From the least recently used on: it goes first among equals.
  for (auto it = cached_.end(); it != cached_.begin();) {
    --it;
    if (need == Need::kGuessed && it->use == expectation_) continue;
    if (it->n_leases > 0 || it->load.n_flying > 0 || (!it->load.landed() && !it->load.parked)) continue;
    if (kept(*it)) {
      std::optional<Entries::iterator>& first = expected(*it) ? least_expected : least_guessed;
      if (!first) first = it;
      continue;
    }
    const int layer = policy_layer(it->record.first);
    if (layer < 0 || !it->load.landed()) return it;
    const double worth = policy_->worth(layer, directory_.entry(it->record.first).expert);
    if (!least || worth < least_worth) {
      least = it;
      least_worth = worth;
    }
  }
  if (!least && need >= Need::kExpected) least = least_guessed;
  if (!least && need == Need::kDemanded) least = least_expected;
  return least;
}

void DemandCache::drop(Entries::iterator cached) {
  pool_.give_back(cached->offset);
  cached_bytes_ -= extent_bytes(cached->record);
  by_first_.erase(cached->record.first);
  cached_.erase(cached);
}

void DemandCache::release(Entries::iterator cached) {
  if (--cached->n_leases == 0 && cached->stale) drop(cached);
}

Result<uint64_t> DemandCache::make_room(uint64_t bytes, uint64_t spare_bytes, const PackEntry& entry, Need need) {
  for (;;) {
    if (cached_bytes_ + bytes + spare_bytes <= memory_.bytes()) {
      if (const auto offset = pool_.take(bytes)) return *offset;
    }
    const auto old = victim(need);
    if (spare_bytes > 0 && (!old || kept(**old))) {
      spare_bytes = 0;
    } else if (old) {
      drop(*old);
    } else if (need == Need::kDemanded && reading()) {
      guesses_.clear();  // which would take the room
      EDGE_TRY(step());  // what is being fetched ahead can be dropped once it has landed
    } else {
      return error(Code::kOverBudget,
                   "%s: needs %llu bytes in a row, the demand cache has %llu and leases hold the rest",
                   entry.name.c_str(), ull(bytes), ull(memory_.bytes()));
    }
  }
}

Result<DemandCache::Entries::iterator> DemandCache::start(const Record& record, Need need) {
  const PackEntry& first = directory_.entry(record.first);
  const uint64_t bytes = extent_bytes(record);
  EDGE_ASSIGN(const uint64_t offset, make_room(bytes, row_bytes_, first, need));
  cached_.emplace_front();
  const auto cached = cached_.begin();
  cached->record = record;
  cached->offset = offset;
  cached->unused = record.n_weights == kMaxRecordWeights ? UINT32_MAX : (uint32_t{1} << record.n_weights) - 1;
  if (need != Need::kGuessed) cached->expectation = expectation_;
  cached_bytes_ += bytes;
  by_first_.emplace(record.first, cached);
  cached->load.first = record.first;
  std::vector<ReadRun>& runs = cached->load.waiting;
  ReadRun run;
  for (WeightId weight = record.first; weight < record.first + record.n_weights; ++weight) {
    std::byte* const into = memory_.data() + offset + (directory_.entry(weight).offset - first.offset);
    cached->load.missing_bytes.push_back(directory_.entry(weight).stored_bytes);
    for (uint64_t begin = 0; !extend_run(&run, directory_, weight, into, &begin);) {
      runs.push_back(std::move(run));
      run = {};
    }
  }
  runs.push_back(std::move(run));
  std::reverse(runs.begin(), runs.end());
  if (need == Need::kDemanded) queue_.push_front(&cached->load);
  if (need == Need::kExpected) queue_.push_back(&cached->load);
  cached->load.parked = cached->load.guessed = need == Need::kGuessed;
  return cached;
}

void DemandCache::prefetch(WeightId weight, RowSet rows) {
  if (weight < 0 || static_cast<size_t>(weight) >= directory_.entries().size() || !rows.empty()) return;
  const Record record = record_of(weight);
  if (const auto known = by_first_.find(record.first); known != by_first_.end()) {
    want(known->second);
    return;
  }
  // An error is told by the acquire that follows.
  if (start(record, Need::kExpected).ok() && !pump().ok()) return;
}

void DemandCache::expect(std::span<const ExpectedWeight> weights, int64_t n_rows) {
  ++expectation_;
  expected_.clear();
  guesses_.clear();
  std::vector<ExpertUse> chosen;
  uint64_t chosen_bytes = 0;
  int layer = -1, pack_layer = -1;
  for (const auto& [weight, weight_rows] : weights) {
    if (weight < 0 || static_cast<size_t>(weight) >= directory_.entries().size()) continue;
    const Record record = record_of(weight);
    if (const auto known = by_first_.find(record.first); known != by_first_.end()) {
      want(known->second);
      cached_.splice(cached_.begin(), cached_, known->second);
    } else if (expected_.empty() || expected_.back().first != record.first) {
      expected_.push_back(record);
    }
    const int expert = directory_.entry(weight).expert;
    if (policy_layer(weight) < 0 || (!chosen.empty() && policy_layer(weight) != layer)) continue;
    layer = policy_layer(weight);
    pack_layer = directory_.entry(weight).layer;
    const auto is_it = [&](const ExpertUse& use) { return use.expert == expert; };
    if (std::any_of(chosen.begin(), chosen.end(), is_it)) continue;
    chosen.push_back({expert, weight_rows});
    chosen_bytes += record.bytes;
  }
  if (!chosen.empty()) {
    policy_->visit(layer, chosen, n_rows);
    judge_guesses(pack_layer, weights);
    pass_bytes_ = (layer > last_layer_ ? pass_bytes_ : 0) + chosen_bytes;
    last_layer_ = layer;
    if (layer + 1 == policy_->n_layers()) pass_expert_bytes_ = pass_bytes_;
  }
  start_expected();
}

// Room is made only from what is not expected; the rest starts when something expected has been used.
void DemandCache::start_expected() {
  while (!expected_.empty()) {
    const Record& record = expected_.front();
    if (!by_first_.contains(record.first) && !start(record, Need::kExpected).ok()) break;
    expected_.pop_front();
  }
  if (!pump().ok()) return;  // told by the acquire that follows
}

size_t DemandCache::first_ready(std::span<const WeightId> weights) {
  WaitTimer timer(&wait_ns_);
  for (;;) {
    bool coming = false;
    std::optional<size_t> begun;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] < 0 || static_cast<size_t>(weights[i]) >= directory_.entries().size()) continue;
      const auto known = by_first_.find(record_of(weights[i]).first);
      if (known == by_first_.end()) continue;
      if (known->second->load.landed()) return i;
      coming = coming || !known->second->load.parked;
      // The last weight arrives while those before it are multiplied with.
      const bool is_begun = !known->second->load.parked && known->second->record.n_weights > 1 &&
                            known->second->load.has_first(static_cast<size_t>(known->second->record.n_weights) - 1);
      if (is_begun && !begun) begun = i;
    }
    if (begun) return *begun;
    if (!coming || !step().ok()) return 0;  // an error is told by the acquire that follows
  }
}

Result<Lease> DemandCache::acquire(WeightId weight, RowSet rows) {
  if (weight < 0 || static_cast<size_t>(weight) >= directory_.entries().size()) {
    return error(Code::kBadArgument, "weight %d is not in the pack", weight);
  }
  if (!rows.empty() && is_tile_format(directory_.entry(weight).format)) return acquire_rows(weight, rows);
  return acquire_whole(weight);
}

void DemandCache::to_front(Load* load) {
  if (const auto queued = std::find(queue_.begin(), queue_.end(), load); queued != queue_.end()) {
    queue_.erase(queued);
    queue_.push_front(load);
  }
}

Status DemandCache::land(Entries::iterator cached, WeightId weight) {
  if (cached->load.has(weight)) return {};
  WaitTimer timer(&wait_ns_);
  to_front(&cached->load);  // demanded now: before what is fetched ahead
  while (!cached->load.has(weight)) EDGE_TRY(step());
  return {};
}

Status DemandCache::land(Entries::iterator cached) {
  WaitTimer timer(&wait_ns_);
  while (!cached->load.landed()) EDGE_TRY(step());
  return {};
}

Result<Lease> DemandCache::acquire_whole(WeightId weight) {
  const Record record = record_of(weight);
  const auto known = by_first_.find(record.first);
  Entries::iterator cached;
  if (known != by_first_.end()) {
    cached = known->second;
    want(cached);
  } else {
    WaitTimer timer(&wait_ns_);
    EDGE_ASSIGN(cached, start(record, Need::kDemanded));
  }
  const uint32_t bit = uint32_t{1} << (weight - record.first);
  ++(cached->unused & bit ? misses_ : hits_);
  EDGE_TRY(land(cached, weight));
  const bool failed_guess = cached->load.guessed && (!cached->load.status.ok() || !cached->load.failures.empty());
  if (failed_guess && cached->n_leases == 0) {
    EDGE_TRY(land(cached));
    drop(cached);
    EDGE_ASSIGN(cached, start(record, Need::kDemanded));
    EDGE_TRY(land(cached, weight));
  }
  cached->unused &= ~bit;
  Status status = cached->load.status;
  for (const auto& [failed, why] : cached->load.failures) {
    if (status.ok() && failed == weight) status = why;
  }
  if (!status.ok()) {
    EDGE_TRY(land(cached));
    if (cached->n_leases == 0) drop(cached);
    else cached->stale = true;  // another weight of the record is in use, and sound
    return status;
  }
  cached_.splice(cached_.begin(), cached_, cached);
  ++cached->n_leases;
  const PackEntry& entry = directory_.entry(weight);
  const std::byte* const data = memory_.data() + cached->offset + (entry.offset - directory_.entry(record.first).offset);
  Lease lease(data, &entry, [this, cached] { release(cached); });
  cached->expectation = 0;
  cached->use = expectation_;
  start_expected();
  return lease;
}

StoreStats DemandCache::stats() const {
  StoreStats stats;
  stats.flash_bytes = flash_bytes_;
  stats.load_bytes = load_bytes_;
  stats.staging_bytes = memory_.bytes();
  stats.hits = hits_;
  stats.misses = misses_;
  stats.pass_expert_bytes = pass_expert_bytes_;
  stats.experts_guessed = n_guessed_;
  stats.experts_guessed_right = n_guessed_right_;
  stats.wait_seconds = 1e-9 * static_cast<double>(wait_ns_.load());
  stats.io_engine = reader_->engine();
  stats.io_direct = reader_->direct();
  return stats;
}

}  // namespace edge
