#include "store/fill.h"

#include <algorithm>

namespace edge {

void Fill::load(BlockReader& reader, uint64_t stretch_bytes) {
  std::vector<ReadRun> flying(static_cast<size_t>(reader.depth())), mine;  // `mine` ends with the next one to submit
  std::vector<size_t> free_slots;
  for (size_t slot = 0; slot < flying.size(); ++slot) free_slots.push_back(slot);
  while (true) {
    while (!free_slots.empty() && status().ok()) {
      if (mine.empty()) take(stretch_bytes, &mine);
      if (mine.empty()) break;
      const size_t slot = free_slots.back();
      flying[slot] = std::move(mine.back());
      mine.pop_back();
      Status submitted = reader.submit(flying[slot].request(slot));
      if (submitted.ok()) free_slots.pop_back();
      else fail(std::move(submitted));
    }
    if (free_slots.size() == flying.size()) return;
    Result<ReadCompletion> waited = reader.wait();
    if (!waited.ok()) return fail(waited.status());
    const ReadCompletion& completion = *waited;
    const ReadRun& run = flying[completion.tag];
    Status landed = completion.status;
    if (landed.ok() && status().ok()) landed = check_run(run, directory_);
    if (!landed.ok()) fail(std::move(landed));
    bytes_.fetch_add(run.bytes, std::memory_order_relaxed);
    if (progress_ != nullptr) progress_->done_bytes += run.bytes;
    free_slots.push_back(completion.tag);
  }
}

void Fill::take(uint64_t stretch_bytes, std::vector<ReadRun>* runs) {
  std::lock_guard lock(mutex_);
  for (uint64_t taken = 0; taken < stretch_bytes && next_ < weights_.size(); taken += runs->back().bytes) {
    ReadRun run;
    while (next_ < weights_.size() &&
           extend_run(&run, directory_, weights_[next_], data_[static_cast<size_t>(weights_[next_])], &begin_)) {
      ++next_;
      begin_ = 0;
    }
    runs->push_back(std::move(run));
  }
  std::reverse(runs->begin(), runs->end());
}

Status Fill::status() {
  std::lock_guard lock(mutex_);
  if (first_.ok() && progress_ != nullptr && progress_->cancel) {
    first_ = error(Code::kCancelled, "%s: loading was cancelled", path_.c_str());
  }
  return first_;
}

void Fill::fail(Status status) {
  std::lock_guard lock(mutex_);
  if (first_.ok()) first_ = std::move(status);
}

}  // namespace edge
