// Integer products over tiles of keys and values for any machine.
#include "kernels/ops_isa_ref.h"
#include "kernels/ops_tiles.h"

namespace edge {
namespace {

struct RefTiles : RefIsa {
  static constexpr int kKeyHeads = 2;
  static constexpr int kValueHeads = 2;

  template <KvType kType, int kHeads>
  static void key_dots(const uint8_t* k, const int8_t* q, int64_t padded, const int32_t*, int32_t (*out)[16]) {
    for (int h = 0; h < kHeads; ++h) {
      for (int token = 0; token < 16; ++token) {
        int32_t sum = 0;
        for (int64_t d = 0; d < padded; ++d) {
          sum += q[h * padded + d] * key<kType>(k, d, token);
        }
        out[h][token] = sum;
      }
    }
  }

  template <KvType kType>
  static int32_t key(const uint8_t* k, int64_t d, int token) {
    if constexpr (kType == KvType::kInt8) {
      return static_cast<int8_t>(k[d / 4 * 64 + token * 4 + d % 4]);
    } else {
      const uint8_t byte = k[d / 32 * 256 + d % 16 / 4 * 64 + token * 4 + d % 4];
      return (d % 32 < 16 ? byte & 15 : byte >> 4) - 8;
    }
  }

  template <KvType kType>
  static int32_t value(const uint8_t* v, int64_t padded, int64_t d, int token) {
    if constexpr (kType == KvType::kInt8) {
      return static_cast<int8_t>(v[token / 2 * 2 * padded + d * 2 + token % 2]);
    } else {
      const uint8_t byte = v[token / 2 * padded + d / 32 * 32 + d % 16 * 2 + token % 2];
      return (d % 32 < 16 ? byte & 15 : byte >> 4) - 8;
    }
  }

  template <KvType kType, int kHeads>
  static void value_dots(const TileArgs& a, int64_t head, int64_t dim) {
    const int64_t padded = a.layout.padded();
    for (int64_t h = head; h < head + kHeads; ++h) {
      for (int64_t d = dim; d < dim + 32; ++d) {
        int32_t sum = 0;
        for (int64_t i = 0; i < a.n_tiles * kKvTileTokens; ++i) {
          const auto* v = reinterpret_cast<const uint8_t*>(a.tiles[i / kKvTileTokens]);
          sum += a.weights[h * a.weight_stride + i] * value<kType>(v, padded, d, static_cast<int>(i % kKvTileTokens));
        }
        a.sums[h * padded + d] += sum;
      }
    }
  }
};

constexpr TileTable kTable = ops::make_tile_table<RefTiles>();

}  // namespace

const TileTable& tile_table_ref() { return kTable; }

}  // namespace edge
