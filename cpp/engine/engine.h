// A loaded model: budget, store, decoder and KV pool in the order they depend on each other.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/budget.h"
#include "core/thread_pool.h"
#include "format/pack_directory.h"
#include "kernels/kernels.h"
#include "kv/kv_cache.h"
#include "model/decoder.h"
#include "store/placed_store.h"

namespace edge {

struct EngineOptions {
  std::string pack_path;
  DecoderConfig decoder;
  StorePlan plan;
  StoreOptions store;
  int n_threads = 1;
  std::string isa;            // empty: the best one, or EDGE_ISA
  int64_t context = 0;        // tokens of KV cache, shared by all sequences
  int64_t max_rows = 128;     // rows of one forward pass; never changes a result
  uint64_t budget_bytes = 0;  // for everything the core reserves
  float neuron_keep = 1;      // of a layer's energy, where a predictor decides (model/neuron_price.h); 1: all it names
  int64_t neuron_free_reads = 0;  // and so many of a layer in any case
  KvOptions kv;
  int64_t score_rows = 1;  // with keys and values on a drive: rows whose scores are held at once
};

// What the core takes from the budget besides weights, ring and caches, known before anything is loaded.
struct FixedBytes {
  uint64_t kv = 0;
  uint64_t activations = 0;
  uint64_t logits = 0;  // per sequence
};
FixedBytes fixed_bytes(const DecoderConfig& config, int64_t context, int64_t max_rows, int n_threads,
                       const KvOptions& kv = {}, int64_t score_rows = 0);

class Engine {
 public:
  // partner: an engine that never computes at the same time; its threads serve this one too.
  static Result<std::unique_ptr<Engine>> open(EngineOptions options, Engine* partner = nullptr);

  // Another budget between passes: plan, max_rows, budget_bytes, what neurons keep, kv and score_rows of `options` count, all
  // else stays. What goes is given back before anything new is reserved; texts in the making go on bit for bit.
  // After an error the engine has its old plan again, or, should the drive fail for that too, restores it when next asked
  // to compute.
  Status resize(const EngineOptions& options);
  // Restores what a failed resize() could not; asked before every pass. kDiskError and whatever else open() may say.
  Status ready();

  Budget& budget() { return budget_; }
  WeightStore& store() { return *store_; }
  Decoder& decoder() { return *decoder_; }
  KvPool& kv_pool() { return *kv_pool_; }
  const PackDirectory& directory() const { return directory_; }
  const Kernels& kernels() const { return *kernels_; }
  ThreadPool& pool() { return *pool_; }
  const EngineOptions& options() const { return options_; }

  // From any thread: the running call returns kCancelled at the next layer. Cleared by resume().
  void cancel() { cancelled_.store(true); }
  void resume() { cancelled_.store(false); }
  // Asked once per layer beside the flag above (signals of the host language).
  std::function<bool()> interrupted;

 private:
  Engine(EngineOptions options, Engine* partner);
  Status place(const EngineOptions& options, LoadProgress* progress);

  EngineOptions options_;
  Budget budget_;
  std::shared_ptr<ThreadPool> pool_;
  PackDirectory directory_;
  const Kernels* kernels_ = nullptr;
  std::unique_ptr<PlacedStore> store_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvPool> kv_pool_;
  bool is_placed_ = false;
  std::atomic<bool> cancelled_{false};
};

}  // namespace edge
