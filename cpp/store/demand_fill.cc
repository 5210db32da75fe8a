// Experts read before the first of them is wanted, into room that is free: otherwise the first tokens would wait for each in
// turn, and for memory that nobody has touched yet.
#include <algorithm>

#include "store/demand_cache.h"

namespace edge {

std::vector<DemandCache::Record> DemandCache::records_that_fit(std::span<const WeightId> weights) const {
  std::vector<Record> records;
  for (const WeightId weight : weights) {
    if (policy_layer(weight) < 0 || by_first_.contains(weight)) continue;
    const Record record = record_of(weight);
    if (record.first == weight) records.push_back(record);
  }
  // A part of every layer's, rather than all of the first layers'.
  std::stable_sort(records.begin(), records.end(), [&](const Record& a, const Record& b) {
    return directory_.entry(a.first).expert < directory_.entry(b.first).expert;
  });
  uint64_t bytes = cached_bytes_ + row_bytes_;
  const auto fits = [&](const Record& record) { return (bytes += extent_bytes(record)) <= memory_.bytes(); };
  records.erase(std::find_if_not(records.begin(), records.end(), fits), records.end());
  return records;
}

Status DemandCache::fill(std::span<const WeightId> weights, LoadProgress* progress) {
  const std::vector<Record> records = records_that_fit(weights);
  if (progress != nullptr) {
    for (const Record& record : records) progress->total_bytes += record.bytes;
  }
  const uint64_t read_before = flash_bytes_;
  Status status;
  std::vector<Entries::iterator> filled;
  for (const Record& record : records) {
    if (progress != nullptr && progress->cancel) status = error(Code::kCancelled, "loading was cancelled");
    if (!status.ok()) break;
    auto started = start(record, Need::kExpected);
    if (!started.ok()) break;  // no room after all
    filled.push_back(*started);
    status = pump();
    while (status.ok() && !queue_.empty()) status = step();  // the queue never runs dry: flights go on
    if (progress != nullptr) progress->done_bytes += record.bytes;
  }
  while (status.ok() && reading()) status = step();
  for (const Entries::iterator& cached : filled) {
    if (!cached->load.landed()) continue;
    cached->unused = 0;  // whoever acquires it waits for nothing
    cached->expectation = 0;
    if (!cached->load.status.ok() || !cached->load.failures.empty()) drop(cached);
  }
  load_bytes_ += flash_bytes_ - read_before;
  flash_bytes_ = read_before;
  return status;
}

}  // namespace edge
