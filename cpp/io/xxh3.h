// XXH3-64 with seed 0 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 algorithm"), but for short inputs: the least
// a pack hashes is the record of one neuron, 144 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace edge {

// Inputs up to this size use other formulas in the specification, which are left out here.
inline constexpr size_t kXxh3ShortBytes = 128;
inline constexpr size_t kXxh3MediumBytes = 240;

// data.size() must be above kXxh3ShortBytes; 0 otherwise.
uint64_t xxh3(std::span<const std::byte> data);

}  // namespace edge
