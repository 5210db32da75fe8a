#include "engine/engine.h"

#include "store/placed_store.h"

namespace edge {
namespace {

KvShape kv_shape(const DecoderConfig& config) {
  KvShape shape;
  shape.n_layers = config.n_layers;
  shape.kv_dim = config.kv_dim();
  return shape;
}

}  // namespace

FixedBytes fixed_bytes(const DecoderConfig& config, int64_t context, int64_t max_rows, int n_threads) {
  const KvShape shape = kv_shape(config);
  FixedBytes fixed;
  fixed.kv = shape.pages_for(context) * shape.page_bytes();
  fixed.activations = Decoder::scratch_bytes(config, {max_rows, context}, n_threads);
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
  if (options.context < 1 || options.max_rows < 1 || options.max_rows > 4096) {
    return error(Code::kBadArgument, "context %lld and max_rows %lld: expected at least 1, and max_rows at most 4096",
                 static_cast<long long>(options.context), static_cast<long long>(options.max_rows));
  }
  EDGE_TRY(options.decoder.validate());
  std::unique_ptr<Engine> engine(new Engine(std::move(options), partner));
  const EngineOptions& settings = engine->options_;
  EDGE_ASSIGN(engine->kernels_, settings.isa.empty() ? default_kernels() : kernels_for(settings.isa));
  EDGE_ASSIGN(engine->directory_, PackDirectory::open(settings.pack_path));
  // What every token needs comes first: a refusal for lack of memory must not follow minutes of loading.
  EDGE_ASSIGN(engine->kv_pool_, KvPool::create(kv_shape(settings.decoder), settings.context,
                                               engine->budget_));
  EDGE_ASSIGN(engine->store_, open_store(settings.pack_path, engine->directory_, settings.plan, settings.store,
                                         engine->budget_));
  EDGE_ASSIGN(engine->decoder_, Decoder::create(settings.decoder, {settings.max_rows, settings.context},
                                                engine->directory_, *engine->store_, *engine->kernels_, *engine->pool_,
                                                engine->budget_));
  engine->options_.store.progress = nullptr;  // the caller's, and only for the load
  Engine* self = engine.get();
  self->decoder_->interrupted = [self] {
    return self->cancelled_.load(std::memory_order_relaxed) || (self->interrupted && self->interrupted());
  };
  return engine;
}

}  // namespace edge
