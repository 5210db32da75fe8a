// Whatever the bytes, PackDirectory answers with a Status or with entries whose bounds hold. Half of the inputs are
// patches to a valid header or directory, so that the checks behind the first ones are reached.
#include <string>

#include "format/pack_directory.h"
#include "fuzz/fuzz_input.h"
#include "io/xxh3.h"

namespace edge::fuzz {
namespace {

constexpr uint64_t kPage = 4096;

uint64_t pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

template <typename T>
void put(std::vector<std::byte>& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

struct Shape {
  const char* name;
  WeightFormat format;
  int32_t layer, expert;
  uint64_t rows, cols;
  uint32_t chunk_bytes;
};

constexpr Shape kShapes[] = {
    {"metadata.json", WeightFormat::kBytes, -1, -1, 1, 700, 4096},
    {"embed.weight", WeightFormat::kQ8_0, -1, -1, 40, 64, 4096},
    {"layers.0.attn_norm.weight", WeightFormat::kF32Vector, 0, -1, 1, 64, 4096},
    {"layers.0.q.weight", WeightFormat::kQ4_K, 0, -1, 33, 256, 8192},
    {"layers.0.experts.3.up.weight", WeightFormat::kF16, 0, 3, 17, 300, 16384},
    {"layers.0.neurons.gates", WeightFormat::kNeuronQ4, 0, -1, 50, 100, 144},
    {"layers.0.neurons.records", WeightFormat::kNeuronQ8, 0, -1, 21, 300, 3 * 544},
};

// A directory that parses, and where its data ends.
std::vector<std::byte> valid_directory(uint64_t* directory_offset) {
  constexpr size_t kEntries = std::size(kShapes);
  std::vector<std::byte> bytes(kPage);
  uint64_t offset = kPage, chunk = 0;
  for (size_t i = 0; i < kEntries; ++i) {
    const Shape& shape = kShapes[i];
    const size_t at = 16 + 128 * i;
    const auto rows = static_cast<int64_t>(shape.rows), cols = static_cast<int64_t>(shape.cols);
    uint64_t size = shape.cols;
    if (shape.format == WeightFormat::kF32Vector) size *= 4;
    if (is_neuron_format(shape.format)) size = shape.rows * shape.chunk_bytes;
    if (is_tile_format(shape.format)) size = static_cast<uint64_t>(tile_bytes(shape.format, rows, cols));
    std::memcpy(bytes.data() + at, shape.name, std::strlen(shape.name));
    put(bytes, at + 64, static_cast<uint32_t>(shape.format));
    put(bytes, at + 68, shape.layer);
    put(bytes, at + 72, shape.rows);
    put(bytes, at + 80, shape.cols);
    put(bytes, at + 88, offset);
    put(bytes, at + 96, size);
    put(bytes, at + 104, shape.chunk_bytes);
    put(bytes, at + 108, shape.expert);
    put(bytes, at + 112, chunk);
    offset += pages(size);
    chunk += (size + shape.chunk_bytes - 1) / shape.chunk_bytes;
  }
  put(bytes, 0, static_cast<uint32_t>(kEntries));
  put(bytes, 8, chunk);
  *directory_offset = offset;
  return bytes;
}

std::vector<std::byte> valid_header(uint64_t file_bytes, uint64_t directory_offset) {
  std::vector<std::byte> header(kPage);
  std::memcpy(header.data(), "EDGEPACK", 8);
  put(header, 8, uint32_t{1});
  put(header, 12, uint32_t{4096});
  put(header, 16, file_bytes);
  put(header, 24, directory_offset);
  put(header, 32, file_bytes - directory_offset);
  return header;
}

void check_entries(const PackDirectory& pack, uint64_t directory_offset) {
  uint64_t end = kPage, chunks = 0;
  for (size_t i = 0; i < pack.entries().size(); ++i) {
    const PackEntry& entry = pack.entries()[i];
    FUZZ_REQUIRE(pack.find(entry.name) == static_cast<WeightId>(i));
    FUZZ_REQUIRE(entry.offset % kPage == 0 && entry.offset >= end && entry.offset - end < kPage);
    FUZZ_REQUIRE(entry.bytes > 0 && entry.stored_bytes == pages(entry.bytes));
    FUZZ_REQUIRE(entry.stored_bytes <= directory_offset && entry.offset <= directory_offset - entry.stored_bytes);
    FUZZ_REQUIRE(entry.chunk_bytes > 0 && entry.chunk_bytes <= PackDirectory::kMaxChunkBytes);
    if (is_neuron_format(entry.format)) {
      FUZZ_REQUIRE(entry.neuron_parts() >= 1 && entry.neuron_parts() <= kMaxNeuronParts);
      FUZZ_REQUIRE(static_cast<int64_t>(entry.chunk_bytes) ==
                   entry.neuron_parts() * neuron_row_bytes(entry.format, entry.cols));
      FUZZ_REQUIRE(entry.bytes == static_cast<uint64_t>(entry.rows) * entry.chunk_bytes);
      FUZZ_REQUIRE(entry.hashed_bytes() == entry.bytes && entry.read_unit_bytes() % kPage == 0);
    } else {
      FUZZ_REQUIRE(entry.chunk_bytes >= kPage && entry.hashed_bytes() == entry.stored_bytes);
    }
    FUZZ_REQUIRE(entry.rows >= 1 && entry.cols >= 1);
    if (is_tile_format(entry.format))
      FUZZ_REQUIRE(entry.bytes == static_cast<uint64_t>(tile_bytes(entry.format, entry.rows, entry.cols)));
    end = entry.offset + entry.stored_bytes;
    chunks = entry.first_chunk + (entry.bytes + entry.chunk_bytes - 1) / entry.chunk_bytes;
    (void)pack.chunk_hash(chunks - 1);
    if (entry.stored_bytes <= 16 * kPage) {
      const std::vector<std::byte> data(entry.stored_bytes);
      (void)pack.check(entry, 0, data);
    }
  }
  FUZZ_REQUIRE(end == directory_offset);
}

void fuzz_header(Input& input, bool patched) {
  auto file_bytes = input.take<uint64_t>();
  std::vector<std::byte> header(kPage);
  if (patched) {
    const uint64_t n_pages = file_bytes % 64 + 2;
    const uint64_t beyond = file_bytes >> 62 == 3 ? file_bytes >> 32 & 0xfff : 0;
    file_bytes = n_pages * kPage + beyond;
    header = valid_header(file_bytes, kPage * (1 + input.take<uint8_t>() % n_pages) + beyond);
    input.patch(header);
    put(header, kPage - 8, xxh3({header.data(), kPage - 8}));
  } else {
    input.fill(header);
  }
  uint64_t offset = 0, bytes = 0, hash = 0;
  if (!PackDirectory::check_header(header, file_bytes, &offset, &bytes, &hash).ok()) return;
  FUZZ_REQUIRE(offset % kPage == 0 && offset >= kPage && bytes % kPage == 0 && bytes >= kPage);
  FUZZ_REQUIRE(bytes <= PackDirectory::kMaxDirectoryBytes && bytes == file_bytes - offset);
}

void fuzz_directory(Input& input, bool patched) {
  uint64_t offset = 0;
  std::vector<std::byte> directory = valid_directory(&offset);
  if (patched) {
    // Whole pages more or fewer, and an offset beside the true one.
    const int extra = input.take<int8_t>();
    if (extra > 0 && extra < 4) directory.resize(directory.size() + static_cast<size_t>(extra) * kPage);
    const int shift = input.take<int8_t>();
    if (shift > 96) offset += static_cast<uint64_t>(shift) * (kPage / 8);
    const bool untouched = input.empty();
    input.patch(directory);
    const Result<PackDirectory> pack = PackDirectory::parse(directory, offset);
    if (untouched && extra <= 0 && shift <= 96) FUZZ_REQUIRE(pack.ok());
    if (pack.ok()) check_entries(*pack, offset);
    return;
  }
  offset = input.take<uint64_t>();
  directory.assign(input.take<uint16_t>() % (3 * kPage), std::byte{0});
  input.fill(directory);
  const Result<PackDirectory> pack = PackDirectory::parse(directory, offset);
  if (pack.ok()) check_entries(*pack, offset);
}

}  // namespace
}  // namespace edge::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  edge::fuzz::Input input(data, size);
  const auto mode = input.take<uint8_t>();
  if (mode & 1)
    edge::fuzz::fuzz_header(input, (mode & 2) != 0);
  else
    edge::fuzz::fuzz_directory(input, (mode & 2) == 0);
  return 0;
}
