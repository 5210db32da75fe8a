// Test hooks for disk and stores, and the two calls `edge doctor` and the probe use: io_engines, bench_read.
#include <cstring>

#include "bindings/binding.h"
#include "core/budget.h"
#include "format/pack_directory.h"
#include "io/read_bench.h"
#include "io/xxh3.h"
#include "store/placed_store.h"
#include "store/read_run.h"

namespace py = pybind11;

namespace edge {
namespace {

std::span<const std::byte> bytes_of(const py::bytes& data) {
  const std::string_view view = data;
  return {reinterpret_cast<const std::byte*>(view.data()), view.size()};
}

py::dict entry_dict(const PackEntry& entry) {
  py::dict dict;
  dict["name"] = entry.name;
  dict["format"] = static_cast<uint32_t>(entry.format);
  dict["layer"] = entry.layer;
  dict["expert"] = entry.expert;
  dict["rows"] = entry.rows;
  dict["cols"] = entry.cols;
  dict["offset"] = entry.offset;
  dict["bytes"] = entry.bytes;
  dict["stored_bytes"] = entry.stored_bytes;
  dict["chunk_bytes"] = entry.chunk_bytes;
  dict["first_chunk"] = entry.first_chunk;
  return dict;
}

py::list entries(const PackDirectory& directory) {
  py::list list;
  for (const PackEntry& entry : directory.entries()) list.append(entry_dict(entry));
  return list;
}

// Any call below may wait for the drive.
template <typename Fn>
auto without_gil(Fn&& fn) {
  py::gil_scoped_release release;
  return fn();
}

py::bytes read_file(const std::string& path, const std::string& engine, bool direct, uint64_t offset, uint64_t bytes,
                    int depth, const std::string& fault, uint64_t request_bytes) {
  if (request_bytes == 0) request_bytes = bytes;
  Budget budget(uint64_t{1} << 32);
  Block block;
  std::string text;
  check(without_gil([&]() -> Status {
    EDGE_ASSIGN(block, budget.reserve(bytes, "io"));
    ReaderOptions options;
    options.engine = engine;
    options.direct = direct;
    options.depth = depth;
    options.fault = fault;
    EDGE_ASSIGN(const std::unique_ptr<BlockReader> reader, open_reader(path, options));
    std::vector<ReadRequest> requests;
    for (uint64_t at = 0; at < bytes; at += request_bytes) {
      requests.push_back({offset + at, std::min(request_bytes, bytes - at), block.data() + at, at});
    }
    return reader->read_all(requests);
  }));
  return py::bytes(block.as<char>(), bytes);
}

py::dict as_dict(const ReadBenchResult& result) {
  py::dict dict;
  dict["engine"] = result.engine;
  dict["direct"] = result.direct;
  dict["align"] = result.align;
  dict["requests"] = result.n_requests;
  dict["bytes"] = result.bytes;
  dict["seconds"] = result.seconds;
  dict["bytes_per_second"] = static_cast<double>(result.bytes) / result.seconds;
  dict["mean_latency_us"] = result.mean_latency_us;
  dict["p99_latency_us"] = result.p99_latency_us;
  dict["cpu_seconds"] = result.cpu_seconds;
  return dict;
}

py::dict bench(const std::string& path, const std::string& engine, bool direct, uint64_t bytes_per_request, int depth,
               double seconds, bool sequential) {
  ReadBenchOptions options;
  options.reader.engine = engine;
  options.reader.direct = direct;
  options.reader.depth = depth;
  options.bytes_per_request = bytes_per_request;
  options.sequential = sequential;
  options.seconds = seconds;
  return as_dict(value(without_gil([&] { return bench_read(path, options); })));
}

py::dict replay(const std::string& path, const std::vector<std::pair<uint64_t, uint64_t>>& pieces,
                const std::vector<uint64_t>& group_ends, int depth) {
  ReaderOptions options;
  options.depth = depth;
  std::vector<ReadPiece> reads;
  for (const auto& [offset, bytes] : pieces) reads.push_back({offset, bytes});
  return as_dict(value(without_gil([&] { return replay_reads(path, options, reads, group_ends); })));
}

// A store with everything it stands on, held the way a model holds it.
class StoreTest {
 public:
  StoreTest(const std::string& path, const std::vector<int>& placements, const std::vector<WeightId>& stream_order,
            uint64_t ring_bytes, uint64_t demand_bytes, uint64_t budget_bytes, const StoreOptions& options)
      : directory_(value(PackDirectory::open(path))), budget_(budget_bytes) {
    const StorePlan plan = plan_of(placements, stream_order, ring_bytes, demand_bytes);
    store_ = value(without_gil([&] { return open_store(path, directory_, plan, options, budget_); }));
  }

  void fill() {
    check(without_gil([&] { return store_->fill(nullptr); }));
  }

  // Another plan under another budget, as an engine does it.
  void replace(const std::vector<int>& placements, const std::vector<WeightId>& stream_order, uint64_t ring_bytes,
               uint64_t demand_bytes, uint64_t budget_bytes) {
    const StorePlan plan = plan_of(placements, stream_order, ring_bytes, demand_bytes);
    check(without_gil([&]() -> Status {
      store_->release(plan);
      budget_.set_limit(budget_bytes);
      return store_->place(plan, nullptr);
    }));
  }

  std::unique_ptr<Lease> hold(WeightId weight, const std::vector<int32_t>& rows) {
    return std::make_unique<Lease>(value(without_gil([&] { return store_->acquire(weight, rows); })));
  }

  // (end tile, the tiles' bytes); 16 rows a tile.
  py::tuple acquire_tiles(WeightId weight, int64_t first) {
    const TileLease tiles = value(without_gil([&] { return store_->acquire_tiles(weight, first); }));
    const PackEntry& entry = tiles.lease.entry();
    const int64_t end = std::min(tiles.end_tile, tiles_of(entry));
    const auto bytes = static_cast<int64_t>(row_tile_bytes(entry));
    const char* data = reinterpret_cast<const char*>(tiles.lease.data() + first * bytes);
    return py::make_tuple(end, py::bytes(data, static_cast<size_t>((end - first) * bytes)));
  }

  py::bytes acquire(WeightId weight, const std::vector<int32_t>& rows) {
    return bytes(*hold(weight, rows), rows.size());
  }

  py::bytes bytes(const Lease& lease, size_t n_rows) const {
    const PackEntry& entry = lease.entry();
    const bool tiles = n_rows > 0 && is_tile_format(entry.format);
    return py::bytes(reinterpret_cast<const char*>(lease.data()), tiles ? n_rows * row_tile_bytes(entry) : entry.bytes);
  }

  void prefetch(WeightId weight, const std::vector<int32_t>& rows) { store_->prefetch(weight, rows); }
  // rows: of each weight; empty = one each.
  void expect(const std::vector<WeightId>& weights, const std::vector<int32_t>& rows, int64_t n_rows) {
    std::vector<ExpectedWeight> expected;
    for (size_t i = 0; i < weights.size(); ++i) expected.push_back({weights[i], i < rows.size() ? rows[i] : 1});
    without_gil([&] { store_->expect(expected, n_rows); });
  }
  bool guesses(WeightId weight, int distance) { return store_->guesses(weight, distance); }
  void guess(const std::vector<WeightId>& weights, int distance) {
    without_gil([&] { store_->guess(weights, distance); });
  }
  size_t first_ready(const std::vector<WeightId>& weights) {
    return without_gil([&] { return store_->first_ready(weights); });
  }
  void rewind() {
    without_gil([&] { store_->rewind(); });
  }

  py::dict stats() const {
    const StoreStats stats = store_->stats();
    py::dict dict;
    dict["flash_bytes"] = stats.flash_bytes;
    dict["load_bytes"] = stats.load_bytes;
    dict["resident_bytes"] = stats.resident_bytes;
    dict["staging_bytes"] = stats.staging_bytes;
    dict["hits"] = stats.hits;
    dict["misses"] = stats.misses;
    dict["pass_expert_bytes"] = stats.pass_expert_bytes;
    dict["wait_seconds"] = stats.wait_seconds;
    dict["experts_guessed"] = stats.experts_guessed;
    dict["experts_guessed_right"] = stats.experts_guessed_right;
    dict["io_engine"] = stats.io_engine;
    dict["io_direct"] = stats.io_direct;
    return dict;
  }

  std::map<std::string, uint64_t> memory() const { return budget_.report(); }
  uint64_t peak_bytes() const { return budget_.peak_bytes(); }

 private:
  static StorePlan plan_of(const std::vector<int>& placements, const std::vector<WeightId>& stream_order,
                           uint64_t ring_bytes, uint64_t demand_bytes) {
    StorePlan plan;
    for (const int placement : placements) plan.placement.push_back(static_cast<Placement>(placement));
    plan.stream_order = stream_order;
    plan.ring_bytes = ring_bytes;
    plan.demand_bytes = demand_bytes;
    return plan;
  }

  PackDirectory directory_;
  Budget budget_;
  std::unique_ptr<PlacedStore> store_;
};

StoreOptions store_options(const std::string& engine, bool direct, int depth, const std::string& fault,
                           LoadProgress* progress, uint64_t part_bytes) {
  StoreOptions options;
  options.stream_part_bytes = part_bytes;
  options.io_engine = engine;
  options.io_direct = direct;
  options.io_depth = depth;
  options.io_fault = fault;
  options.progress = progress;
  return options;
}

void bind(py::module_& module) {
  module.def(
      "xxh3", [](const py::bytes& data) { return xxh3(bytes_of(data)); }, py::arg("data"),
      "XXH3-64 (seed 0) of more than 240 bytes.");
  module.def("read_file", &read_file, py::arg("path"), py::arg("engine") = "auto", py::arg("direct") = true,
             py::arg("offset") = 0, py::arg("bytes") = 4096, py::arg("depth") = 32, py::arg("fault") = "",
             py::arg("request_bytes") = 0, "Bytes of a file, read in requests of request_bytes (0 = one).");
  module.def("bench_read", &bench, py::arg("path"), py::arg("engine") = "auto", py::arg("direct") = true,
             py::arg("bytes_per_request") = 1 << 20, py::arg("depth") = 32, py::arg("seconds") = 1.0,
             py::arg("sequential") = false,
             "Reads with `depth` requests in flight; rates in bytes per second, times in us.");
  module.def("replay_reads", &replay, py::arg("path"), py::arg("pieces"), py::arg("group_ends"), py::arg("depth") = 32,
             "Reads (offset, bytes) pieces with `depth` in flight, all of a group before the next; as bench_read.");
  module.def("io_engines", [] { return availability(io_engines()); },
             "name, available, reason of every I/O engine, in the order `auto` tries them.");
  module.def("page_cached", &page_cached, py::arg("path"), py::arg("offset"), py::arg("bytes"),
             "Whether the page cache holds all of a range; False where the kernel cannot tell.");

  py::class_<PackDirectory>(module, "PackDirectory", "The proven directory of a pack file.")
      .def_static(
          "open", [](const std::string& path) { return value(without_gil([&] { return PackDirectory::open(path); })); },
          py::arg("path"))
      .def_static(
          "parse",
          [](const py::bytes& directory, uint64_t directory_offset) {
            return value(PackDirectory::parse(bytes_of(directory), directory_offset));
          },
          py::arg("directory"), py::arg("directory_offset"), "The directory alone, its hash not checked.")
      .def_static(
          "check_header",
          [](const py::bytes& header, uint64_t file_bytes) {
            uint64_t offset = 0, bytes = 0, hash = 0;
            check(PackDirectory::check_header(bytes_of(header), file_bytes, &offset, &bytes, &hash));
            return py::make_tuple(offset, bytes, hash);
          },
          py::arg("header"), py::arg("file_bytes"), "(directory offset, bytes, hash) of a valid header.")
      .def("entries", &entries)
      .def("find", &PackDirectory::find, py::arg("name"))
      .def("memory_bytes", &PackDirectory::memory_bytes)
      .def(
          "read",
          [](const PackDirectory& directory, const std::string& path, const std::string& name) {
            const WeightId weight = directory.find(name);
            if (weight == kNoWeight) raise(error(Code::kBadFile, "%s: no entry %s", path.c_str(), name.c_str()));
            return py::bytes(value(without_gil([&] { return read_entry(path, directory, weight); })));
          },
          py::arg("path"), py::arg("name"), "The checked payload of one entry.");

  py::class_<LoadProgress>(module, "LoadProgress", "Progress of a load, readable from another thread.")
      .def(py::init())
      .def_property_readonly("done_bytes", [](const LoadProgress& progress) { return progress.done_bytes.load(); })
      .def_property_readonly("total_bytes", [](const LoadProgress& progress) { return progress.total_bytes.load(); })
      .def("cancel", [](LoadProgress& progress) { progress.cancel = true; });

  py::class_<Lease>(module, "LeaseTest").def("release", &Lease::reset);
  py::class_<StoreTest>(module, "WeightStoreTest")
      .def(py::init([](const std::string& path, const std::vector<int>& placements,
                       const std::vector<WeightId>& stream_order, uint64_t ring_bytes, uint64_t demand_bytes,
                       uint64_t budget, const std::string& engine, bool direct, int depth, const std::string& fault,
                       LoadProgress* progress, uint64_t part_bytes) {
             return std::make_unique<StoreTest>(path, placements, stream_order, ring_bytes, demand_bytes, budget,
                                                store_options(engine, direct, depth, fault, progress, part_bytes));
           }),
           py::arg("path"), py::arg("placements"), py::arg("stream_order") = std::vector<WeightId>(),
           py::arg("ring_bytes") = 0, py::arg("demand_bytes") = 0, py::arg("budget") = uint64_t{1} << 30,
           py::arg("engine") = "auto", py::arg("direct") = true, py::arg("depth") = 32, py::arg("fault") = "",
           py::arg("progress") = nullptr, py::arg("part_bytes") = kStreamPartBytes)
      .def("acquire_tiles", &StoreTest::acquire_tiles, py::arg("weight"), py::arg("first"),
           "(tile after the last, bytes) of what comes together from tile `first` on; the lease is dropped at once.")
      .def("replace", &StoreTest::replace, py::arg("placements"), py::arg("stream_order"), py::arg("ring_bytes"),
           py::arg("demand_bytes"), py::arg("budget"))
      .def("peak_bytes", &StoreTest::peak_bytes)
      .def("fill", &StoreTest::fill)
      .def("acquire", &StoreTest::acquire, py::arg("weight"), py::arg("rows") = std::vector<int32_t>(),
           "Bytes of the weight, or of one tile per row; the lease is dropped at once.")
      .def("hold", &StoreTest::hold, py::arg("weight"), py::arg("rows") = std::vector<int32_t>(),
           py::keep_alive<0, 1>())
      .def("bytes", &StoreTest::bytes, py::arg("lease"), py::arg("n_rows") = 0)
      .def("prefetch", &StoreTest::prefetch, py::arg("weight"), py::arg("rows") = std::vector<int32_t>())
      .def("expect", &StoreTest::expect, py::arg("weights"), py::arg("rows") = std::vector<int32_t>(),
           py::arg("n_rows") = 1)
      .def("guesses", &StoreTest::guesses, py::arg("weight"), py::arg("distance") = 1)
      .def("guess", &StoreTest::guess, py::arg("weights"), py::arg("distance") = 1)
      .def("first_ready", &StoreTest::first_ready, py::arg("weights"))
      .def("rewind", &StoreTest::rewind)
      .def("stats", &StoreTest::stats)
      .def("memory", &StoreTest::memory, "Budgeted bytes per tag.");
}

const Binding binding("store", bind);

}  // namespace
}  // namespace edge
