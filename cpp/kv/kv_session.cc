#include "kv/kv_session.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>

#include "io/stream_file.h"
#include "io/xxh3.h"

namespace edge {
namespace {

constexpr char kMagic[8] = {'E', 'D', 'G', 'E', 'S', 'E', 'S', 'S'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 4096;
constexpr int64_t kGroupTokens = kKvTileTokens;  // a divisor of every page
constexpr const char* kTypeNames[] = {"f16", "int8", "int4"};
constexpr uint64_t kLeastBytes = 256;  // xxh3() takes no less

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t group_tokens;
  uint64_t digest;
  uint64_t n_tokens;
  uint64_t n_committed;
  uint32_t n_layers;
  uint32_t kv_dim;
  uint32_t kv_type;  // KvType
};
using HeaderBytes = std::array<std::byte, kHeaderBytes>;  // Header, zeros, xxh3 of all before it

unsigned long long ull(uint64_t value) { return value; }

uint64_t file_bytes(const Header& header, const KvShape& shape) {
  const uint64_t n_groups = (header.n_committed + kGroupTokens - 1) / kGroupTokens;
  return kHeaderBytes + header.n_tokens * 4 + 8 +
         n_groups * static_cast<uint64_t>(shape.n_layers) * 2 * (shape.group_bytes() + 8);
}

std::span<const std::byte> bytes_of(const uint64_t& value) { return std::as_bytes(std::span(&value, 1)); }

// Of any length: what is shorter than the hash takes is followed by zeros.
uint64_t hash_of(std::span<const std::byte> data) {
  if (data.size() >= kLeastBytes) return xxh3(data);
  std::array<std::byte, kLeastBytes> padded = {};
  if (!data.empty()) std::memcpy(padded.data(), data.data(), data.size());
  return xxh3(padded);
}

// Where a group's keys or values lie in memory; those on a drive are read into a buffer of the drive's ranges first.
Result<std::byte*> group_at(KvCache& kv, int64_t group, int64_t layer, KvHalf half) {
  const KvShape& shape = kv.pool().shape();
  const int64_t slot = group * kGroupTokens;
  const KvPage& page = kv.pages()[static_cast<size_t>(slot / shape.page_tokens)];
  const uint64_t within = static_cast<uint64_t>(slot % shape.page_tokens / kGroupTokens) * shape.group_bytes();
  if (page.frame >= 0) return kv.pool().half(page.frame, layer, half) + within;
  KvFlash& flash = *kv.pool().flash();
  EDGE_TRY(flash.read_half(page.place, layer, half, flash.buffer(0)));
  return flash.buffer(0) + within;
}

// Rows behind the last one hold whatever was rolled back there.
void clear_behind(const KvShape& shape, KvHalf half, std::byte* group, int64_t n_rows) {
  if (n_rows >= kGroupTokens) return;
  if (shape.type == KvType::kF16) {
    const uint64_t used = static_cast<uint64_t>(n_rows) * shape.row_bytes();
    std::memset(group + used, 0, shape.group_bytes() - used);
    return;
  }
  const KvTileLayout tile = shape.tile();
  for (int64_t i = 0; i < shape.n_tiles(); ++i) kv_clear(tile, half == kValues, n_rows, group + i * tile.bytes());
}

template <typename Fn>
Status for_groups(const KvShape& shape, int64_t n_committed, const std::function<bool()>& interrupted, Fn&& fn) {
  uint64_t index = 0;
  for (int64_t group = 0; group * kGroupTokens < n_committed; ++group) {
    if (interrupted && interrupted()) return error(Code::kCancelled, "cancelled at token %lld",
                                                   static_cast<long long>(group * kGroupTokens));
    for (int64_t layer = 0; layer < shape.n_layers; ++layer) {
      for (const KvHalf half : {kKeys, kValues}) EDGE_TRY(fn(group, layer, half, index++));
    }
  }
  return {};
}

Status check_header(const std::string& path, const HeaderBytes& bytes, const SessionModel& model,
                    const KvShape& shape, uint64_t found_bytes, Header* header) {
  std::memcpy(header, bytes.data(), sizeof *header);
  if (std::memcmp(header->magic, kMagic, sizeof kMagic) != 0) {
    return error(Code::kBadFile, "%s: expected a saved session, found something else", path.c_str());
  }
  if (header->version != kVersion || header->group_tokens != kGroupTokens) {
    return error(Code::kUnsupported, "%s: expected a session of version %u, found version %u", path.c_str(), kVersion,
                 header->version);
  }
  uint64_t expected;
  std::memcpy(&expected, bytes.data() + kHeaderBytes - 8, 8);
  const uint64_t found = xxh3(std::span(bytes).first(kHeaderBytes - 8));
  if (found != expected) {
    return error(Code::kCorrupt, "%s: the header is damaged: expected hash %016llx, found %016llx", path.c_str(),
                 ull(expected), ull(found));
  }
  if (header->digest != model.digest) {
    return error(Code::kUnsupported, "%s: this session belongs to another model: expected digest %016llx, found %016llx",
                 path.c_str(), ull(model.digest), ull(header->digest));
  }
  const auto context = static_cast<uint64_t>(model.context);
  if (header->n_tokens > context) {
    return error(Code::kContextOverflow, "%s: the session holds %llu tokens, the context %llu", path.c_str(),
                 ull(header->n_tokens), ull(context));
  }
  if (header->kv_type != static_cast<uint32_t>(shape.type)) {
    const char* found_type = header->kv_type < std::size(kTypeNames) ? kTypeNames[header->kv_type] : "unknown";
    return error(Code::kUnsupported, "%s: expected a session of %s keys and values (kv_type), found %s", path.c_str(),
                 kTypeNames[static_cast<int>(shape.type)], found_type);
  }
  if (header->n_committed > header->n_tokens || header->n_layers != static_cast<uint64_t>(shape.n_layers) ||
      header->kv_dim != static_cast<uint64_t>(shape.kv_dim)) {
    return error(Code::kBadFile, "%s: expected %lld layers of %lld values, found %u of %u, and %llu of %llu tokens",
                 path.c_str(), static_cast<long long>(shape.n_layers), static_cast<long long>(shape.kv_dim),
                 header->n_layers, header->kv_dim, ull(header->n_committed), ull(header->n_tokens));
  }
  if (file_bytes(*header, shape) != found_bytes) {
    return error(Code::kBadFile, "%s: expected a file of %llu bytes, found %llu", path.c_str(),
                 ull(file_bytes(*header, shape)), ull(found_bytes));
  }
  return {};
}

Status load_into(const std::string& path, const SessionModel& model, KvCache& kv,
                 const std::function<bool()>& interrupted, std::vector<int32_t>* tokens) {
  const KvShape& shape = kv.pool().shape();
  EDGE_ASSIGN(const std::unique_ptr<StreamReader> file, StreamReader::open(path));
  HeaderBytes bytes;
  EDGE_TRY(file->read(bytes));
  Header header;
  EDGE_TRY(check_header(path, bytes, model, shape, file->bytes(), &header));

  tokens->resize(header.n_tokens);
  uint64_t expected = 0;
  EDGE_TRY(file->read(std::as_writable_bytes(std::span(*tokens))));
  EDGE_TRY(file->read(std::as_writable_bytes(std::span(&expected, 1))));
  const uint64_t found = hash_of(std::as_bytes(std::span(*tokens)));
  if (found != expected) {
    return error(Code::kCorrupt, "%s: the tokens are damaged: expected hash %016llx, found %016llx", path.c_str(),
                 ull(expected), ull(found));
  }
  for (const int32_t token : *tokens) {
    if (token < 0 || token >= model.vocab_size) {
      return error(Code::kBadFile, "%s: expected tokens in 0..%lld, found %d", path.c_str(),
                   static_cast<long long>(model.vocab_size - 1), token);
    }
  }
  const auto n_committed = static_cast<int64_t>(header.n_committed);
  EDGE_TRY(for_groups(shape, n_committed, interrupted,
                      [&](int64_t group, int64_t layer, KvHalf half, uint64_t index) -> Status {
    const int64_t slot = group * kGroupTokens;
    if (layer == 0 && half == kKeys) {
      kv.commit_all();
      EDGE_TRY(kv.stage(std::min(kGroupTokens, n_committed - slot)));
    }
    const std::span<std::byte> into(kv.group(layer, half, slot), shape.group_bytes());
    uint64_t stored = 0;
    EDGE_TRY(file->read(into));
    EDGE_TRY(file->read(std::as_writable_bytes(std::span(&stored, 1))));
    if (hash_of(into) + index == stored) return {};
    return error(Code::kCorrupt, "%s: %s of layer %lld at token %lld are damaged: expected hash %016llx, found %016llx",
                 path.c_str(), half == kKeys ? "keys" : "values", static_cast<long long>(layer),
                 static_cast<long long>(slot), ull(stored - index), ull(hash_of(into)));
  }));
  kv.commit_all();
  kv.forget_tail();
  return {};
}

}  // namespace

Status save_session(const std::string& path, const SessionModel& model, std::span<const int32_t> tokens, KvCache& kv,
                    const std::function<bool()>& interrupted) {
  kv.rollback();
  const KvShape& shape = kv.pool().shape();
  const int64_t n_committed = kv.n_committed();
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.group_tokens = kGroupTokens;
  header.digest = model.digest;
  header.n_tokens = tokens.size();
  header.n_committed = static_cast<uint64_t>(n_committed);
  header.n_layers = static_cast<uint32_t>(shape.n_layers);
  header.kv_dim = static_cast<uint32_t>(shape.kv_dim);
  header.kv_type = static_cast<uint32_t>(shape.type);
  HeaderBytes bytes = {};
  std::memcpy(bytes.data(), &header, sizeof header);
  const uint64_t hash = xxh3(std::span(bytes).first(kHeaderBytes - 8));
  std::memcpy(bytes.data() + kHeaderBytes - 8, &hash, 8);

  EDGE_ASSIGN(const std::unique_ptr<StreamWriter> file, StreamWriter::create(path));
  EDGE_TRY(file->write(bytes));
  EDGE_TRY(file->write(std::as_bytes(tokens)));
  EDGE_TRY(file->write(bytes_of(hash_of(std::as_bytes(tokens)))));
  EDGE_TRY(for_groups(shape, n_committed, interrupted,
                      [&](int64_t group, int64_t layer, KvHalf half, uint64_t index) -> Status {
    EDGE_ASSIGN(std::byte* const rows, group_at(kv, group, layer, half));
    clear_behind(shape, half, rows, n_committed - group * kGroupTokens);
    const std::span<const std::byte> data(rows, shape.group_bytes());
    EDGE_TRY(file->write(data));
    return file->write(bytes_of(hash_of(data) + index));
  }));
  return file->finish();
}

Result<std::vector<int32_t>> load_session(const std::string& path, const SessionModel& model, KvCache& kv,
                                          const std::function<bool()>& interrupted) {
  kv.rollback();
  kv.truncate(0);
  std::vector<int32_t> tokens;
  const Status status = load_into(path, model, kv, interrupted, &tokens);
  if (status.ok()) return tokens;
  kv.truncate(0);
  return status;
}

}  // namespace edge
