// Where keys and values live, between dicts and the core.
#pragma once

#include <pybind11/pybind11.h>

#include "engine/engine.h"

namespace edge {

// Reads "kv": {"resident_pages", "range_pages", "score_rows", "folder", "write_fault"}; absent, all stay in memory.
void kv_options_from(const pybind11::dict& dict, EngineOptions* options);
// Adds kv_written_bytes, kv_read_bytes and kv_wait_seconds.
void add_kv_stats(Engine& engine, pybind11::dict& dict);

}  // namespace edge
