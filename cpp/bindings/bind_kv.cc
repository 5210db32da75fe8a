#include "bindings/binding.h"
#include "bindings/config_from_dict.h"
#include "bindings/kv_options.h"
#include "engine/sequence.h"

namespace py = pybind11;

namespace edge {

void kv_options_from(const py::dict& dict, EngineOptions* options) {
  if (!dict.contains("kv")) return;
  const py::dict kv = dict["kv"].cast<py::dict>();
  options->kv.resident_pages = kv["resident_pages"].cast<int64_t>();
  options->kv.range_pages = kv["range_pages"].cast<int64_t>();
  options->score_rows = kv["score_rows"].cast<int64_t>();
  options->kv.scratch.folder = kv["folder"].cast<std::string>();
  options->kv.scratch.reader.engine = options->store.io_engine;
  if (kv.contains("write_fault")) options->kv.scratch.write_fault = kv["write_fault"].cast<std::string>();
  if (kv.contains("read_fault")) options->kv.scratch.reader.fault = kv["read_fault"].cast<std::string>();
}

void add_kv_stats(Engine& engine, py::dict& dict) {
  const KvTraffic traffic = engine.kv_pool().traffic();
  dict["kv_page_tokens"] = engine.kv_pool().page_tokens();
  dict["kv_written_bytes"] = traffic.written_bytes;
  dict["kv_read_bytes"] = traffic.read_bytes;
  dict["kv_wait_seconds"] = traffic.wait_seconds;
}

namespace {

void bind(py::module_& module) {
  module.def(
      "kv_flash_shape",
      [](const py::dict& decoder) {
        const DecoderConfig config = decoder_config_from(decoder);
        check(config.validate());
        const KvShape shape =
            KvPool::flash_shape(config.n_layers, config.kv_dim(), config.kv_type, config.head_dim);
        return py::make_tuple(shape.page_tokens, shape.page_bytes(), shape.half_bytes());
      },
      "Of keys and values on a drive: (tokens of a page, its bytes, bytes of one layer's keys in it).");
  module.def(
      "kv_flash_bytes",
      [](const py::dict& decoder, int64_t context, int64_t max_rows, int n_threads, int64_t resident_pages,
         int64_t range_pages, int64_t score_rows) {
        const DecoderConfig config = decoder_config_from(decoder);
        check(config.validate());
        KvOptions kv;
        kv.resident_pages = resident_pages;
        kv.range_pages = range_pages;
        const FixedBytes fixed = fixed_bytes(config, context, max_rows, n_threads, kv, score_rows);
        return py::make_tuple(fixed.kv, fixed.activations, fixed.logits);
      },
      "fixed_bytes with keys and values on a drive: (memory of the kv cache, activations, logits per sequence).");
}

template <typename Fn>
void run(Fn&& fn) {
  const Status status = [&] {
    py::gil_scoped_release release;
    return fn();
  }();
  if (PyErr_Occurred()) throw py::error_already_set();  // Ctrl-C, seen inside
  check(status);
}

void bind_session(py::module_& module) {
  module.def("save_session", [](Sequence& sequence, const std::string& path) { run([&] { return sequence.save(path); }); },
             "Writes a sequence's tokens, keys and values to a file.");
  module.def("load_session", [](Sequence& sequence, const std::string& path) { run([&] { return sequence.load(path); }); },
             "Replaces a sequence's tokens, keys and values by those of a file.");
}

const Binding kv_binding("kv", bind);
const Binding session_binding("session", bind_session);

}  // namespace
}  // namespace edge
