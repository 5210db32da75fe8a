#include "engine/engine.h"

#include <algorithm>

namespace edge {
namespace {

KvShape flash_shape(const DecoderConfig& config) {
  return KvPool::flash_shape(config.n_layers, config.kv_dim(), config.kv_type, config.head_dim);
}

KvShape kv_shape(const DecoderConfig& config, const KvOptions& kv) {
  if (kv.on_flash()) return flash_shape(config);
  KvShape shape;
  shape.type = config.kv_type;
  shape.head_dim = config.head_dim;
  shape.n_layers = config.n_layers;
  shape.kv_dim = config.kv_dim();
  return shape;
}

// With what a pass needs of the tail, and a block for one more text.
KvOptions with_tails(const DecoderConfig& config, KvOptions kv, int64_t max_rows) {
  if (config.kv_type != KvType::kInt4) return kv;
  kv.n_tails = (max_rows + 2 * (KvShape::kTailTokens - 1)) / KvShape::kTailTokens + 1;
  return kv;
}

DecoderOptions decoder_options(int64_t max_rows, int64_t context, const KvShape& shape, const KvOptions& kv,
                               int64_t score_rows) {
  DecoderOptions options;
  options.max_rows = max_rows;
  options.context = context;
  if (!kv.on_flash()) return options;
  options.score_rows = score_rows;
  options.range_tokens = kv.range_pages * shape.page_tokens;
  return options;
}

DecoderOptions decoder_options(const EngineOptions& options, const KvShape& shape) {
  DecoderOptions out = decoder_options(options.max_rows, options.context, shape, options.kv, options.score_rows);
  out.neuron_keep = options.neuron_keep;
  out.neuron_free_reads = options.neuron_free_reads;
  return out;
}

Status check_rows(int64_t context, int64_t max_rows) {
  if (context >= 1 && max_rows >= 1 && max_rows <= 4096) return {};
  return error(Code::kBadArgument, "context %lld and max_rows %lld: expected at least 1, and max_rows at most 4096",
               static_cast<long long>(context), static_cast<long long>(max_rows));
}

// Bounds of a plan that came from outside, so that no size below can overflow.
Status check(const KvOptions& kv, int64_t score_rows, const KvShape& shape, int64_t context, int64_t max_rows) {
  if (kv.resident_pages == 0) return {};
  const int64_t least = (max_rows + shape.page_tokens - 2) / shape.page_tokens + 1, most = shape.pages_for(context);
  if (kv.resident_pages < least || kv.resident_pages > std::max(least, most)) {
    return error(Code::kBadArgument, "kv cache: expected %lld to %lld pages in memory, found %lld",
                 static_cast<long long>(least), static_cast<long long>(std::max(least, most)),
                 static_cast<long long>(kv.resident_pages));
  }
  if (kv.range_pages < 1 || kv.range_pages > most || score_rows < 1 || score_rows > max_rows) {
    return error(Code::kBadArgument, "kv cache: expected ranges of 1 to %lld pages and scores of 1 to %lld rows, found "
                 "%lld and %lld", static_cast<long long>(most), static_cast<long long>(max_rows),
                 static_cast<long long>(kv.range_pages), static_cast<long long>(score_rows));
  }
  return {};
}

}  // namespace

FixedBytes fixed_bytes(const DecoderConfig& config, int64_t context, int64_t max_rows, int n_threads,
                       const KvOptions& kv, int64_t score_rows) {
  const KvShape shape = kv_shape(config, kv);
  FixedBytes fixed;
  fixed.kv = KvPool::bytes(shape, context, with_tails(config, kv, max_rows));
  fixed.activations =
      Decoder::scratch_bytes(config, decoder_options(max_rows, context, shape, kv, score_rows), n_threads);
  fixed.logits = static_cast<uint64_t>(config.vocab_size) * sizeof(float);
  return fixed;
}

Engine::Engine(EngineOptions options, Engine* partner)
    : options_(std::move(options)), budget_(options_.budget_bytes),
      pool_(partner != nullptr ? partner->pool_ : std::make_shared<ThreadPool>(options_.n_threads)) {}

Result<std::unique_ptr<Engine>> Engine::open(EngineOptions options, Engine* partner) {
  if (options.n_threads < 1 || options.n_threads > 1024) {
    return error(Code::kBadArgument, "threads: expected 1..1024, found %d", options.n_threads);
  }
  EDGE_TRY(check_rows(options.context, options.max_rows));
  EDGE_TRY(options.decoder.validate());
  std::unique_ptr<Engine> engine(new Engine(std::move(options), partner));
  const EngineOptions& settings = engine->options_;
  EDGE_ASSIGN(engine->kernels_, settings.isa.empty() ? default_kernels() : kernels_for(settings.isa));
  EDGE_ASSIGN(engine->directory_, PackDirectory::open(settings.pack_path));
  engine->options_.kv = with_tails(settings.decoder, settings.kv, settings.max_rows);
  engine->options_.decoder.by_neuron = engine->directory_.has_neurons();
  // What every token needs comes first: a refusal for lack of memory must not follow minutes of loading.
  const KvShape shape = kv_shape(settings.decoder, settings.kv);
  EDGE_TRY(check(settings.kv, settings.score_rows, shape, settings.context, settings.max_rows));
  EDGE_ASSIGN(engine->kv_pool_, KvPool::create(shape, settings.context, settings.kv, engine->budget_));
  EDGE_ASSIGN(engine->store_, open_store(settings.pack_path, engine->directory_, settings.plan, settings.store,
                                         engine->budget_));
  EDGE_ASSIGN(engine->decoder_, Decoder::create(settings.decoder, decoder_options(settings, shape), engine->directory_,
                                                *engine->store_, *engine->kernels_, *engine->pool_, engine->budget_));
  engine->options_.store.progress = nullptr;  // the caller's, and only for the load
  engine->is_placed_ = true;
  Engine* self = engine.get();
  self->decoder_->interrupted = [self] {
    return self->cancelled_.load(std::memory_order_relaxed) || (self->interrupted && self->interrupted());
  };
  return engine;
}

Status Engine::resize(const EngineOptions& wanted) {
  EngineOptions options = options_;
  options.plan = wanted.plan;
  options.max_rows = wanted.max_rows;
  options.budget_bytes = wanted.budget_bytes;
  options.neuron_keep = wanted.neuron_keep;
  options.neuron_free_reads = wanted.neuron_free_reads;
  options.kv = with_tails(options.decoder, wanted.kv, options.max_rows);
  options.score_rows = wanted.score_rows;
  const KvShape shape = kv_shape(options.decoder, options.kv);
  EDGE_TRY(check_rows(options.context, options.max_rows));
  EDGE_TRY(check(options.kv, options.score_rows, shape, options.context, options.max_rows));
  EDGE_TRY(PlacedStore::check(directory_, options.plan));
  const Status status = place(options, wanted.store.progress);
  if (status.ok()) {
    options_ = std::move(options);
  } else if (!place(options_, nullptr).ok()) {
    is_placed_ = false;  // ready() tries again
  }
  return status;
}

Status Engine::ready() { return is_placed_ ? Status() : place(options_, nullptr); }

Status Engine::place(const EngineOptions& options, LoadProgress* progress) {
  is_placed_ = false;
  const KvShape shape = kv_shape(options.decoder, options.kv);
  decoder_->release();
  store_->release(options.plan);
  if (!kv_pool_->is_settled(options.kv)) {
    EDGE_TRY(kv_pool_->park(flash_shape(options.decoder), options.kv, budget_));
  }
  budget_.set_limit(options.budget_bytes);
  EDGE_TRY(kv_pool_->settle(shape, options.kv, budget_));
  EDGE_TRY(store_->place(options.plan, progress));
  EDGE_TRY(decoder_->reserve(decoder_options(options, shape), budget_));
  is_placed_ = true;
  return {};
}

}  // namespace edge
