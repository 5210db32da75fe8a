// How resident weights come in: long reads of whole chunks, each checked by whoever read it.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "io/block_reader.h"
#include "store/read_run.h"

namespace edge {

// The reads that bring in `weights` (in file order) to where `data` (by weight) says, handed out to any number of loaders.
class Fill {
 public:
  Fill(const std::string& path, const PackDirectory& directory, const std::vector<WeightId>& weights,
       const std::vector<std::byte*>& data, LoadProgress* progress)
      : path_(path), directory_(directory), weights_(weights), data_(data), progress_(progress) {}

  // Reads until nothing is left or anybody failed, taking about `stretch_bytes` that lie side by side at a time; returns when
  // none of this reader's reads is in flight. From any thread, with a reader of its own.
  void load(BlockReader& reader, uint64_t stretch_bytes);

  // The first error of all loaders, or that loading was cancelled.
  Status status();
  uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }  // that have landed

 private:
  void take(uint64_t stretch_bytes, std::vector<ReadRun>* runs);
  void fail(Status status);

  const std::string& path_;
  const PackDirectory& directory_;
  const std::vector<WeightId>& weights_;
  const std::vector<std::byte*>& data_;
  LoadProgress* const progress_;
  std::atomic<uint64_t> bytes_{0};
  std::mutex mutex_;
  // Guarded by mutex_.
  size_t next_ = 0;     // into weights_
  uint64_t begin_ = 0;  // of that weight
  Status first_;
};

}  // namespace edge
