// Compares every ISA this machine can run with ref, bit for bit. Python-free, so that it also runs under an emulator.
// Usage: kernel_selftest gemv ISA FORMAT M K: one product of a tile, and nothing compared, for who counts instructions.
//        kernel_selftest [n_rounds] [seed] [ISA]; exit 0 when all agree, else 1 with the first difference of each kernel. The
// first kEveryM rounds of a matrix product take 1, 2, ... activation rows, so that every way through a tile is taken.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "tests/neuron_selftest.h"
#include "tests/ops_selftest.h"
#include "tests/tile_selftest.h"

namespace {

using namespace edge;

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  float symmetric() { return static_cast<float>(static_cast<double>(next() >> 11) * 0x1p-52 - 1.0); }
};

// Finite halves: mostly ordinary, some zero, subnormal, or the largest.
uint16_t random_half(Random& random) {
  const auto sign = static_cast<uint16_t>(random.below(2) << 15);
  switch (random.below(8)) {
    case 0: return sign;
    case 1: return static_cast<uint16_t>(sign | (1 + random.below(0x3ff)));
    case 2: return static_cast<uint16_t>(sign | 0x7bff);
    default: return static_cast<uint16_t>(sign | (0x2000 + random.below(0x1c00)));
  }
}

void put_halves(Random& random, std::byte* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t half = random_half(random);
    std::memcpy(p + 2 * i, &half, 2);
  }
}

std::vector<std::byte> random_tiles(Random& random, WeightFormat format, int64_t rows, int64_t k) {
  std::vector<std::byte> tiles(static_cast<size_t>(tile_bytes(format, rows, k)));
  const int64_t fill = random.below(4);  // 0: all quants smallest, 1: largest, else random
  for (std::byte& byte : tiles) {
    byte = fill == 0 ? std::byte{0} : fill == 1 ? std::byte{0xff} : static_cast<std::byte>(random.next());
  }
  const int64_t block = traits(format).tile_block_bytes;
  for (int64_t at = 0; at < static_cast<int64_t>(tiles.size()); at += block) {
    std::byte* p = tiles.data() + at;
    if (format == WeightFormat::kF32) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float value = random.below(16) == 0 ? 0x1p-140f : random.symmetric();
        std::memcpy(p + 4 * r, &value, 4);
      }
      continue;
    }
    if (format == WeightFormat::kBF16) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float value = random.symmetric();
        std::memcpy(p + 2 * r, reinterpret_cast<const std::byte*>(&value) + 2, 2);
      }
      continue;
    }
    switch (traits(format).scales) {
      case Scales::kExponent:
        for (int64_t r = 0; r < kTileRows; ++r) p[r] = static_cast<std::byte>(random.next());
        break;
      case Scales::kTwoHalves: put_halves(random, p, 2 * kTileRows); break;
      default: put_halves(random, p, kTileRows); break;
    }
  }
  return tiles;
}

// Rows of ordinary values with blocks that are zero, subnormal, all at the extremes, or far apart in size.
std::vector<float> random_activations(Random& random, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  int64_t kind = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i % 32 == 0) kind = random.below(8);
    float value = random.symmetric();
    if (kind == 0) value = 0.0f;
    if (kind == 1) value *= 0x1p-145f;
    if (kind == 2) value = value < 0 ? -3.0f : 3.0f;
    if (kind == 3) value *= 0x1p60f;
    if (kind == 4) value = 3.0f;
    x[static_cast<size_t>(i)] = value;
  }
  return x;
}

bool same(const void* a, const void* b, size_t n) { return std::memcmp(a, b, n) == 0; }

// Equal bits, or both NaN: their payload is the machine's choice.
bool same_floats(const std::vector<float>& a, const std::vector<float>& b, size_t* at) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], 4) != 0 && !(a[i] != a[i] && b[i] != b[i])) {
      *at = i;
      return false;
    }
  }
  return true;
}

std::vector<std::byte> pack_activations(const Kernels& kernels, ActKind kind, const std::vector<float>& x, int64_t m,
                                        int64_t k) {
  const int64_t stride = act_row_bytes(kind, k);
  std::vector<std::byte> acts(static_cast<size_t>(m * stride));
  for (int64_t i = 0; i < m; ++i) {
    std::byte* row = acts.data() + i * stride;
    if (kind == ActKind::kF32) std::memcpy(row, x.data() + i * k, static_cast<size_t>(stride));
    if (kind == ActKind::kQ8x32) kernels.quantize_q8x32(x.data() + i * k, k, reinterpret_cast<ActQ8x32*>(row));
    if (kind == ActKind::kQ8x256) kernels.quantize_q8x256(x.data() + i * k, k, reinterpret_cast<ActQ8x256*>(row));
  }
  return acts;
}

constexpr int64_t kEveryM = 18;

int compare(const Kernels& ref, const Kernels& isa, WeightFormat format, int64_t round, Random& random) {
  const FormatTraits& traits_of = traits(format);
  const int64_t block = traits_of.block_values;
  const int64_t k = block == 1 ? 1 + random.below(300) : block * (1 + random.below(256 / block + 2));
  const int64_t rows = 1 + random.below(70);
  const int64_t m = round < kEveryM ? round + 1 : 1 + random.below(random.below(4) == 0 ? 150 : 9);
  const ActKind kind = act_kind(format);
  const std::vector<std::byte> tiles = random_tiles(random, format, rows, k);
  const std::vector<float> x = random_activations(random, m * k);
  const std::vector<std::byte> acts = pack_activations(ref, kind, x, m, k);
  const std::vector<std::byte> isa_acts = pack_activations(isa, kind, x, m, k);
  int failures = 0;
  if (!same(acts.data(), isa_acts.data(), acts.size())) {
    std::printf("%s: activations for %s differ from ref (m=%lld k=%lld)\n", isa.isa, traits_of.name,
                static_cast<long long>(m), static_cast<long long>(k));
    ++failures;
  }
  const int64_t y_stride = tile_count(rows) * kTileRows + 3;
  std::vector<float> expected(static_cast<size_t>(m * y_stride), 7.0f);
  std::vector<float> found = expected;
  const auto f = static_cast<uint32_t>(format);
  const int64_t begin = random.below(tile_count(rows));
  ref.gemv[f](tiles.data(), k, acts.data(), act_row_bytes(kind, k), m, expected.data(), y_stride, begin,
              tile_count(rows));
  isa.gemv[f](tiles.data(), k, acts.data(), act_row_bytes(kind, k), m, found.data(), y_stride, begin,
              tile_count(rows));
  size_t at = 0;
  if (!same_floats(expected, found, &at)) {
    std::printf("%s: %s m=%lld k=%lld rows=%lld: y[%zu] is %a, ref has %a\n", isa.isa, traits_of.name,
                static_cast<long long>(m), static_cast<long long>(k), static_cast<long long>(rows), at,
                static_cast<double>(found[at]), static_cast<double>(expected[at]));
    ++failures;
  }
  return failures;
}

// Rounds of one kernel until one differs; the number of differences.
template <typename Round>
int rounds(int64_t n_rounds, uint64_t seed, const Round& round) {
  Random random{seed};
  for (int64_t i = 0; i < n_rounds; ++i) {
    if (const int failed = round(i, random); failed != 0) return failed;
  }
  return 0;
}

int compare_all(const Kernels& ref, const Kernels& isa, int64_t n_rounds, uint64_t seed) {
  int failures = 0;
  for (int f = 0; f < kTileFormats; ++f) {
    failures += rounds(n_rounds, seed * 1000 + static_cast<uint64_t>(f), [&](int64_t i, Random& random) {
      return compare(ref, isa, static_cast<WeightFormat>(f), i, random);
    });
  }
  for (int f = 0; f < kNeuronFormats; ++f) {
    const auto format = static_cast<WeightFormat>(static_cast<int>(WeightFormat::kNeuronF16) + f);
    failures += rounds(n_rounds, seed * 1000 + 100 + static_cast<uint64_t>(f), [&](int64_t, Random& random) {
      return compare_neurons(ref, isa, format, random, random_half, random_activations);
    });
  }
  for (const KvType type : {KvType::kInt8, KvType::kInt4}) {
    failures += rounds(n_rounds, seed * 1000 + 200 + static_cast<uint64_t>(type), [&](int64_t, Random& random) {
      return compare_tiles(ref, isa, type, random, random_half);
    });
  }
  return failures + rounds(n_rounds, seed * 1000 + 300, [&](int64_t, Random& random) {
           return compare_ops(ref, isa, random, random_half, random_activations);
         });
}

// One tile of zeros times m rows of zeros: no kernel asks what the values are.
int multiply_once(const char* isa, const char* format_name, int64_t m, int64_t k) {
  const Result<const Kernels*> found = kernels_for(isa);
  if (!found.ok()) {
    std::printf("%s\n", found.status().message().c_str());
    return 1;
  }
  for (int f = 0; f < kTileFormats; ++f) {
    const auto format = static_cast<WeightFormat>(f);
    if (std::strcmp(traits(format).name, format_name) != 0) continue;
    const int64_t act_stride = act_row_bytes(act_kind(format), k);
    const int64_t room = std::max<int64_t>(k, 4096);  // the same for every k: zeros take instructions too
    const std::vector<std::byte> tile(static_cast<size_t>(tile_bytes(format, kTileRows, room)));
    const std::vector<std::byte> acts(static_cast<size_t>(m * act_row_bytes(act_kind(format), room)));
    std::vector<float> y(static_cast<size_t>(m * kTileRows));
    (*found)->gemv[f](tile.data(), k, acts.data(), act_stride, m, y.data(), kTileRows, 0, 1);
    return 0;
  }
  std::printf("unknown format '%s'\n", format_name);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 6 && std::strcmp(argv[1], "gemv") == 0) {
    return multiply_once(argv[2], argv[3], std::atoll(argv[4]), std::atoll(argv[5]));
  }
  const int64_t n_rounds = argc > 1 ? std::atoll(argv[1]) : 20;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const char* only = argc > 3 ? argv[3] : "";
  const Kernels& ref = **kernels_for("ref");
  int failures = 0;
  int n_compared = 0;
  for (const IsaInfo& info : list_isas()) {
    if (!info.available) {
      std::printf("%s: not run: %s\n", info.name.c_str(), info.reason.c_str());
      continue;
    }
    if (info.name == "ref" || (only[0] != '\0' && info.name != only)) continue;
    const Kernels& isa = **kernels_for(info.name);
    const int isa_failures = compare_all(ref, isa, n_rounds, seed);
    ++n_compared;
    failures += isa_failures;
    std::printf("%s: %s\n", info.name.c_str(), isa_failures == 0 ? "same bits as ref" : "DIFFERS");
  }
  if (n_compared == 0) std::printf("nothing to compare: only ref runs here\n");
  return failures == 0 && n_compared > 0 ? 0 : 1;
}
