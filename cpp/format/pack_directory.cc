#include "format/pack_directory.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "io/block_reader.h"
#include "io/xxh3.h"

namespace edge {
namespace {

constexpr char kMagic[8] = {'E', 'D', 'G', 'E', 'P', 'A', 'C', 'K'};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kAlign = 4096;
constexpr uint64_t kHeaderHashOffset = PackDirectory::kHeaderBytes - 8;
constexpr uint64_t kHeaderUsedBytes = 48;
constexpr uint64_t kDirectoryHeadBytes = 16;
constexpr uint64_t kEntryBytes = 128;
constexpr uint64_t kNameBytes = 64;
constexpr uint64_t kMaxDimension = INT32_MAX;  // rows are addressed by int32
constexpr int32_t kMaxIndex = 65'535;          // layers and experts

unsigned long long ull(uint64_t value) { return value; }

// Little-endian, as the pack is; every supported machine is too.
template <typename T>
T read(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte value) { return value == std::byte{0}; });
}

bool name_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
}

// Empty when the field is not a name padded with zeros.
std::string parse_name(const std::byte* field) {
  const char* text = reinterpret_cast<const char*>(field);
  const size_t length = strnlen(text, kNameBytes);
  if (!std::all_of(text, text + length, name_character)) return "";
  if (!all_zero({field + length, kNameBytes - length})) return "";
  return std::string(text, length);
}

// Payload bytes that format and shape ask for.
Status expected_bytes(const PackEntry& entry, uint64_t* bytes) {
  const auto rows = static_cast<uint64_t>(entry.rows), cols = static_cast<uint64_t>(entry.cols);
  const char* name = entry.name.c_str();
  if (is_tile_format(entry.format)) {
    const FormatTraits& format = traits(entry.format);
    if (entry.cols % format.block_values != 0) {
      return error(Code::kBadFile, "pack entry %s: %llu columns, expected a multiple of %lld for %s", name, ull(cols),
                   static_cast<long long>(format.block_values), format.name);
    }
    const auto stride = static_cast<uint64_t>(tile_stride_bytes(entry.format, entry.cols));
    if (__builtin_mul_overflow(static_cast<uint64_t>(tile_count(entry.rows)), stride, bytes)) {
      return error(Code::kBadFile, "pack entry %s: the shape %llu x %llu does not fit in 64 bits", name, ull(rows),
                   ull(cols));
    }
    return {};
  }
  if (is_neuron_format(entry.format)) {
    const auto row = static_cast<uint64_t>(neuron_row_bytes(entry.format, entry.cols));
    const uint64_t record = entry.chunk_bytes;
    if (record % row != 0 || record / row < 1 || record / row > kMaxNeuronParts ||
        record > PackDirectory::kMaxChunkBytes) {
      return error(Code::kBadFile,
                   "pack entry %s: expected records (chunks) of 1 to %lld rows of %llu bytes, at most %llu, found %llu",
                   name, static_cast<long long>(kMaxNeuronParts), ull(row), ull(PackDirectory::kMaxChunkBytes),
                   ull(record));
    }
    *bytes = rows * record;  // below 2^31 * 2^24
    return {};
  }
  if (entry.format != WeightFormat::kF32Vector && entry.format != WeightFormat::kBytes) {
    return error(Code::kUnsupported, "pack entry %s: unknown weight format %u", name,
                 static_cast<uint32_t>(entry.format));
  }
  if (rows != 1) return error(Code::kBadFile, "pack entry %s: expected 1 row, found %llu", name, ull(rows));
  *bytes = entry.format == WeightFormat::kF32Vector ? cols * sizeof(float) : cols;
  return {};
}

// What the entries before this one fix: where its data and its hashes begin.
struct Cursor {
  uint64_t offset = PackDirectory::kHeaderBytes;
  uint64_t chunk = 0;
};

Result<PackEntry> parse_entry(const std::byte* at, uint32_t index, uint64_t n_chunks, uint64_t directory_offset,
                              Cursor* cursor) {
  PackEntry entry;
  entry.name = parse_name(at);
  if (entry.name.empty()) {
    return error(Code::kBadFile, "pack entry %u: expected a zero-padded name of [A-Za-z0-9._-]", index);
  }
  const char* name = entry.name.c_str();
  entry.format = static_cast<WeightFormat>(read<uint32_t>(at + 64));
  entry.layer = read<int32_t>(at + 68);
  const auto rows = read<uint64_t>(at + 72), cols = read<uint64_t>(at + 80);
  entry.offset = read<uint64_t>(at + 88);
  entry.bytes = read<uint64_t>(at + 96);
  entry.chunk_bytes = read<uint32_t>(at + 104);
  entry.expert = read<int32_t>(at + 108);
  entry.first_chunk = read<uint64_t>(at + 112);
  const bool blob = entry.format == WeightFormat::kBytes;
  if (rows < 1 || rows > kMaxDimension || cols < 1 || (!blob && cols > kMaxDimension) || cols > uint64_t{1} << 50) {
    return error(Code::kBadFile, "pack entry %s: the shape %llu x %llu is out of range", name, ull(rows), ull(cols));
  }
  entry.rows = static_cast<int64_t>(rows);
  entry.cols = static_cast<int64_t>(cols);
  if (entry.layer < -1 || entry.layer > kMaxIndex || entry.expert < -1 || entry.expert > kMaxIndex) {
    return error(Code::kBadFile, "pack entry %s: layer %d or expert %d is outside -1 to %d", name, entry.layer,
                 entry.expert, kMaxIndex);
  }
  if (read<uint64_t>(at + 120) != 0) return error(Code::kBadFile, "pack entry %s: reserved bytes are not zero", name);
  uint64_t expected = 0;
  EDGE_TRY(expected_bytes(entry, &expected));
  if (entry.bytes != expected) {
    return error(Code::kBadFile, "pack entry %s: expected %llu bytes for its format and shape, found %llu", name,
                 ull(expected), ull(entry.bytes));
  }
  if (entry.offset != cursor->offset) {
    return error(Code::kBadFile, "pack entry %s: expected its data at offset %llu, found %llu", name,
                 ull(cursor->offset), ull(entry.offset));
  }
  if (entry.bytes > directory_offset - entry.offset) {
    return error(Code::kBadFile, "pack entry %s: %llu bytes at offset %llu reach past the data's end at %llu", name,
                 ull(entry.bytes), ull(entry.offset), ull(directory_offset));
  }
  // Both ends are multiples of 4096, so the padded size fits as well.
  entry.stored_bytes = round_up(entry.bytes, kAlign);
  const uint64_t chunk = entry.chunk_bytes;
  if (!is_neuron_format(entry.format) &&
      (chunk < kAlign || chunk > PackDirectory::kMaxChunkBytes || (chunk & (chunk - 1)) != 0)) {
    return error(Code::kBadFile, "pack entry %s: expected chunks of a power of two from 4096 to %llu bytes, found %llu",
                 name, ull(PackDirectory::kMaxChunkBytes), ull(chunk));
  }
  const uint64_t n_own = (entry.bytes + chunk - 1) / chunk;
  if (entry.first_chunk != cursor->chunk || n_own > n_chunks - cursor->chunk) {
    return error(Code::kBadFile, "pack entry %s: expected %llu chunks from %llu on, found first chunk %llu of %llu",
                 name, ull(n_own), ull(cursor->chunk), ull(entry.first_chunk), ull(n_chunks));
  }
  cursor->offset += entry.stored_bytes;
  cursor->chunk += n_own;
  return entry;
}

}  // namespace

Status PackDirectory::check_header(std::span<const std::byte> header, uint64_t file_bytes, uint64_t* directory_offset,
                                   uint64_t* directory_bytes, uint64_t* directory_hash) {
  if (header.size() != kHeaderBytes || file_bytes < kHeaderBytes) {
    return error(Code::kBadFile, "pack header: expected %llu bytes, found %llu", ull(kHeaderBytes),
                 ull(std::min<uint64_t>(header.size(), file_bytes)));
  }
  const std::byte* at = header.data();
  if (std::memcmp(at, kMagic, sizeof kMagic) != 0)
    return error(Code::kBadFile, "pack header: this is not an edge pack");
  const auto version = read<uint32_t>(at + 8);
  if (version != kVersion) {
    return error(Code::kUnsupported, "pack header: expected version %u, found %u", kVersion, version);
  }
  const uint64_t found = xxh3(header.first(kHeaderHashOffset)), expected = read<uint64_t>(at + kHeaderHashOffset);
  if (found != expected) {
    return error(Code::kCorrupt, "pack header: expected hash %016llx, found %016llx", ull(expected), ull(found));
  }
  if (read<uint32_t>(at + 12) != kHeaderBytes) {
    return error(Code::kBadFile, "pack header: expected a header of %llu bytes, found %u", ull(kHeaderBytes),
                 read<uint32_t>(at + 12));
  }
  if (!all_zero(header.subspan(kHeaderUsedBytes, kHeaderHashOffset - kHeaderUsedBytes))) {
    return error(Code::kBadFile, "pack header: reserved bytes are not zero");
  }
  const auto named_bytes = read<uint64_t>(at + 16), offset = read<uint64_t>(at + 24), bytes = read<uint64_t>(at + 32);
  if (named_bytes != file_bytes) {
    return error(Code::kBadFile, "pack header: expected a file of %llu bytes, found %llu", ull(named_bytes),
                 ull(file_bytes));
  }
  if (bytes < kAlign || bytes > kMaxDirectoryBytes || bytes % kAlign != 0) {
    return error(Code::kBadFile, "pack header: expected a directory of 4096 to %llu bytes, found %llu",
                 ull(kMaxDirectoryBytes), ull(bytes));
  }
  if (offset < kHeaderBytes || offset % kAlign != 0 || offset > file_bytes || bytes != file_bytes - offset) {
    return error(Code::kBadFile,
                 "pack header: expected a directory that ends the file of %llu bytes, found %llu bytes at %llu",
                 ull(file_bytes), ull(bytes), ull(offset));
  }
  *directory_offset = offset;
  *directory_bytes = bytes;
  *directory_hash = read<uint64_t>(at + 40);
  return {};
}

Result<PackDirectory> PackDirectory::parse(std::span<const std::byte> directory, uint64_t directory_offset) {
  if (directory.size() < kAlign || directory.size() > kMaxDirectoryBytes || directory.size() % kAlign != 0 ||
      directory_offset < kHeaderBytes || directory_offset % kAlign != 0) {
    return error(Code::kBadFile, "pack directory: %llu bytes at offset %llu are out of range", ull(directory.size()),
                 ull(directory_offset));
  }
  const auto n_entries = read<uint32_t>(directory.data());
  const auto n_chunks = read<uint64_t>(directory.data() + 8);
  if (n_entries > kMaxEntries || read<uint32_t>(directory.data() + 4) != 0 || n_chunks > kMaxDirectoryBytes / 8) {
    return error(Code::kBadFile, "pack directory: %u entries and %llu chunks are out of range", n_entries,
                 ull(n_chunks));
  }
  const uint64_t used = kDirectoryHeadBytes + n_entries * kEntryBytes + n_chunks * 8;
  if (round_up(used, kAlign) != directory.size()) {
    return error(Code::kBadFile, "pack directory: expected %llu bytes for %u entries and %llu chunks, found %llu",
                 ull(round_up(used, kAlign)), n_entries, ull(n_chunks), ull(directory.size()));
  }
  if (!all_zero(directory.subspan(used))) return error(Code::kBadFile, "pack directory: the padding is not zero");
  PackDirectory pack;
  pack.entries_.reserve(n_entries);
  pack.by_name_.reserve(n_entries);
  Cursor cursor;
  for (uint32_t index = 0; index < n_entries; ++index) {
    EDGE_ASSIGN(PackEntry entry, parse_entry(directory.data() + kDirectoryHeadBytes + index * kEntryBytes, index,
                                             n_chunks, directory_offset, &cursor));
    if (!pack.by_name_.emplace(entry.name, static_cast<WeightId>(index)).second) {
      return error(Code::kBadFile, "pack entry %u: the name %s occurs twice", index, entry.name.c_str());
    }
    pack.entries_.push_back(std::move(entry));
  }
  if (cursor.offset != directory_offset || cursor.chunk != n_chunks) {
    return error(Code::kBadFile, "pack directory: expected data up to %llu and %llu chunks, found %llu and %llu",
                 ull(directory_offset), ull(n_chunks), ull(cursor.offset), ull(cursor.chunk));
  }
  pack.hashes_.resize(n_chunks);
  if (n_chunks > 0) {
    std::memcpy(pack.hashes_.data(), directory.data() + kDirectoryHeadBytes + n_entries * kEntryBytes, n_chunks * 8);
  }
  pack.digest_ = xxh3(directory);
  return pack;
}

Result<PackDirectory> PackDirectory::open(const std::string& path) {
  ReaderOptions options;
  options.engine = "pread";
  options.depth = 1;  // two reads, one after the other
  EDGE_ASSIGN(const std::unique_ptr<BlockReader> reader, open_reader(path, options));
  const auto in_file = [&](const Status& status) {
    return Status(status.code(), status.code() == Code::kDiskError ? status.message() : path + ": " + status.message());
  };
  if (reader->file_bytes() < kHeaderBytes) {
    return error(Code::kBadFile, "%s: expected a pack, found a file of %llu bytes", path.c_str(),
                 ull(reader->file_bytes()));
  }
  struct Aligned {
    void operator()(std::byte* at) const { ::operator delete[](at, std::align_val_t(kReadAlign)); }
  };
  using Buffer = std::unique_ptr<std::byte[], Aligned>;
  const auto allocate = [](uint64_t bytes) {
    return Buffer(new (std::align_val_t(kReadAlign), std::nothrow) std::byte[bytes]);
  };
  const Buffer header = allocate(kHeaderBytes);
  if (header == nullptr) return error(Code::kOverBudget, "%s: the system refused a page", path.c_str());
  const ReadRequest read_header{0, kHeaderBytes, header.get(), 0};
  if (const Status status = reader->read_all({&read_header, 1}); !status.ok()) return in_file(status);
  uint64_t offset = 0, bytes = 0, hash = 0;
  if (const Status status = check_header({header.get(), kHeaderBytes}, reader->file_bytes(), &offset, &bytes, &hash);
      !status.ok()) {
    return in_file(status);
  }
  const Buffer directory = allocate(bytes);
  if (directory == nullptr) {
    return error(Code::kOverBudget, "%s: the system refused %llu bytes for the directory", path.c_str(), ull(bytes));
  }
  const ReadRequest read_directory{offset, bytes, directory.get(), 0};
  if (const Status status = reader->read_all({&read_directory, 1}); !status.ok()) return in_file(status);
  const uint64_t found = xxh3({directory.get(), bytes});
  if (found != hash) {
    return in_file(
        error(Code::kCorrupt, "pack directory: expected hash %016llx, found %016llx", ull(hash), ull(found)));
  }
  Result<PackDirectory> pack = parse({directory.get(), bytes}, offset);
  if (!pack.ok()) return in_file(pack.status());
  pack->where_.append(path).append(": ");
  return pack;
}

WeightId PackDirectory::find(std::string_view name) const {
  const auto found = by_name_.find(std::string(name));
  return found == by_name_.end() ? kNoWeight : found->second;
}

bool PackDirectory::has_neurons() const {
  return std::any_of(entries_.begin(), entries_.end(), [](const PackEntry& e) { return is_neuron_format(e.format); });
}

uint64_t PackDirectory::memory_bytes() const {
  // Names are kept twice; a map node is about four words.
  return entries_.capacity() * (sizeof(PackEntry) + kNameBytes + sizeof(std::string) + 4 * sizeof(void*)) +
         hashes_.capacity() * sizeof(uint64_t);
}

Status PackDirectory::check(const PackEntry& entry, uint64_t begin, std::span<const std::byte> data) const {
  const uint64_t chunk_bytes = entry.chunk_bytes;
  uint64_t end = begin + data.size();
  if (begin % chunk_bytes != 0 || end > entry.stored_bytes || (end % chunk_bytes != 0 && end != entry.stored_bytes)) {
    return error(Code::kBadArgument, "%s: bytes %llu to %llu are not whole chunks", entry.name.c_str(), ull(begin),
                 ull(end));
  }
  end = std::min(end, entry.hashed_bytes());
  for (uint64_t at = begin; at < end; at += chunk_bytes) {
    const uint64_t chunk = at / chunk_bytes;
    const uint64_t expected = hashes_[entry.first_chunk + chunk];
    const uint64_t found = xxh3(data.subspan(at - begin, std::min(chunk_bytes, end - at)));
    if (found != expected) {
      return error(Code::kCorrupt,
                   "%s%s: chunk %llu at offset %llu is damaged: expected hash %016llx, found %016llx; delete the pack "
                   "and make it again (edge verify checks all of it)",
                   where_.c_str(), entry.name.c_str(), ull(chunk), ull(entry.offset + at), ull(expected), ull(found));
    }
  }
  return {};
}

}  // namespace edge
