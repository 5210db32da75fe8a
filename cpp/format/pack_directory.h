// The pack's directory: the only code that looks at untrusted structure. Everything behind it sees proven bounds.
#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/status.h"
#include "kernels/format.h"

namespace edge {

using WeightId = int32_t;
inline constexpr WeightId kNoWeight = -1;

struct PackEntry {
  std::string name;
  WeightFormat format = WeightFormat::kBytes;
  int32_t layer = -1;
  int32_t expert = -1;
  int64_t rows = 0;
  int64_t cols = 0;
  uint64_t offset = 0;        // multiple of 4096
  uint64_t bytes = 0;         // payload
  uint64_t stored_bytes = 0;  // payload rounded up to 4096
  // Bytes under one hash. Of a neuron format it is one record (rows neurons of cols = hidden values), whatever that
  // measures; of any other a power of two of whole pages, and the last chunk includes the padding.
  uint64_t chunk_bytes = 0;
  uint64_t first_chunk = 0;

  // Only of a neuron format: rows in one record, 1 to 3, and hashed bytes (the padding behind the records is not).
  int64_t neuron_parts() const { return static_cast<int64_t>(chunk_bytes) / neuron_row_bytes(format, cols); }
  uint64_t hashed_bytes() const { return is_neuron_format(format) ? bytes : stored_bytes; }
  // The shortest run that begins and ends both at a chunk and at a page: what O_DIRECT can read and check() can check.
  uint64_t read_unit_bytes() const { return std::lcm(chunk_bytes, uint64_t{4096}); }
};

class PackDirectory {
 public:
  // Reads and proves header and directory of the file at `path`.
  static Result<PackDirectory> open(const std::string& path);
  // The same from bytes already in memory (fuzzing, tests). file_bytes is the size the file really has.
  static Status check_header(std::span<const std::byte> header, uint64_t file_bytes, uint64_t* directory_offset,
                             uint64_t* directory_bytes, uint64_t* directory_hash);
  static Result<PackDirectory> parse(std::span<const std::byte> directory, uint64_t directory_offset);

  static constexpr uint64_t kHeaderBytes = 4096;
  static constexpr uint64_t kMaxDirectoryBytes = uint64_t{64} << 20;
  static constexpr uint32_t kMaxEntries = 100'000;
  static constexpr uint64_t kMaxChunkBytes = uint64_t{16} << 20;

  const std::vector<PackEntry>& entries() const { return entries_; }
  WeightId find(std::string_view name) const;  // kNoWeight when absent
  bool has_neurons() const;  // some entries are of a neuron format
  const PackEntry& entry(WeightId id) const { return entries_[static_cast<size_t>(id)]; }
  uint64_t chunk_hash(uint64_t chunk) const { return hashes_[chunk]; }

  // Of all that was hashed: two packs with equal digests hold the same model.
  uint64_t digest() const { return digest_; }

  // Bytes this object itself keeps in memory, for the plan's account.
  uint64_t memory_bytes() const;

  // Checks the chunks of `entry` that cover [begin, end) of its stored bytes; both multiples of chunk_bytes or the end
  // (of a neuron format: the end of the last record or of the padding).
  // `data` holds those bytes. kCorrupt names file, entry, chunk, expected and found hash, and the repair.
  Status check(const PackEntry& entry, uint64_t begin, std::span<const std::byte> data) const;

 private:
  std::string where_;  // "path: " in front of messages; empty for bytes from memory
  std::vector<PackEntry> entries_;
  std::vector<uint64_t> hashes_;
  uint64_t digest_ = 0;
  std::unordered_map<std::string, WeightId> by_name_;
};

}  // namespace edge
