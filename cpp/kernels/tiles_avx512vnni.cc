// Integer products over tiles of keys and values: a register of dot products holds 16 tokens, or 16 dimensions.
#include "kernels/ops_isa_avx512vnni.h"
#include "kernels/ops_tiles.h"

namespace edge {
namespace {

struct Avx512Tiles : Avx512Isa {
  static constexpr int kKeyHeads = 8;
  static constexpr int kValueHeads = 8;

  static __m512i four(const int8_t* q) {
    int32_t word;
    __builtin_memcpy(&word, q, 4);
    return _mm512_set1_epi32(word);
  }
  static __m512i pair(const int16_t* w) {
    int32_t word;
    __builtin_memcpy(&word, w, 4);
    return _mm512_set1_epi32(word);
  }

  template <KvType kType, int kHeads>
  static void key_dots(const uint8_t* k, const int8_t* q, int64_t padded, const int32_t* q_sums, int32_t (*out)[16]) {
    __m512i sums[kHeads];
    // vpdpbusd wants keys without a sign: the offset comes off again at the end.
    constexpr int32_t kOffset = kType == KvType::kInt8 ? 128 : 8;
    for (int h = 0; h < kHeads; ++h) sums[h] = _mm512_set1_epi32(-kOffset * q_sums[h]);
    if constexpr (kType == KvType::kInt8) {
      const __m512i flip = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
      for (int64_t d = 0; d < padded; d += 4) {
        const __m512i keys = _mm512_xor_si512(_mm512_loadu_si512(k + d * 16), flip);
        for (int h = 0; h < kHeads; ++h) sums[h] = _mm512_dpbusd_epi32(sums[h], keys, four(q + h * padded + d));
      }
    } else {
      const __m512i low = _mm512_set1_epi8(15);
      for (int64_t d = 0; d < padded; d += 32) {
        for (int64_t step = 0; step < 16; step += 4) {
          const __m512i keys = _mm512_loadu_si512(k + d * 8 + step * 16);
          const __m512i first = _mm512_and_si512(keys, low);
          const __m512i second = _mm512_and_si512(_mm512_srli_epi16(keys, 4), low);
          for (int h = 0; h < kHeads; ++h) {
            const int8_t* at = q + h * padded + d + step;
            sums[h] = _mm512_dpbusd_epi32(sums[h], first, four(at));
            sums[h] = _mm512_dpbusd_epi32(sums[h], second, four(at + 16));
          }
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) _mm512_storeu_si512(out[h], sums[h]);
  }

  // 32 dims of two tokens as int16 pairs.
  template <KvType kType>
  static void load_pair(const uint8_t* v, __m512i* first, __m512i* second) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(v));
    if constexpr (kType == KvType::kInt8) {
      *first = _mm512_cvtepi8_epi16(bytes);
      *second = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(v + 32)));
    } else {
      const __m512i wide = _mm512_cvtepu8_epi16(bytes), offset = _mm512_set1_epi16(8);
      *first = _mm512_sub_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(15)), offset);
      *second = _mm512_sub_epi16(_mm512_srli_epi16(wide, 4), offset);
    }
  }

  template <KvType kType, int kHeads>
  static void value_dots(const TileArgs& a, int64_t head, int64_t dim) {
    const int64_t padded = a.layout.padded(), pair_bytes = a.layout.data_bytes() / 8;
    const int64_t offset = kType == KvType::kInt8 ? 2 * dim : dim;
    __m512i sums[kHeads][2];
    for (int h = 0; h < kHeads; ++h) {
      int32_t* at = a.sums + (head + h) * padded + dim;
      for (int i = 0; i < 2; ++i) sums[h][i] = _mm512_loadu_si512(at + 16 * i);
    }
    for (int64_t tile = 0; tile < a.n_tiles; ++tile) {
      const auto* v = reinterpret_cast<const uint8_t*>(a.tiles[tile]) + offset;
      const int16_t* w = a.weights + head * a.weight_stride + tile * kKvTileTokens;
      if (tile + 1 < a.n_tiles) {
        const std::byte* next = a.tiles[tile + 1] + offset;
        for (int i = 0; i < 8; ++i) __builtin_prefetch(next + i * pair_bytes);
      }
      for (int i = 0; i < 8; ++i) {
        __m512i first, second;
        load_pair<kType>(v + i * pair_bytes, &first, &second);
        for (int h = 0; h < kHeads; ++h) {
          const __m512i weight = pair(w + h * a.weight_stride + 2 * i);
          sums[h][0] = _mm512_dpwssd_epi32(sums[h][0], first, weight);
          sums[h][1] = _mm512_dpwssd_epi32(sums[h][1], second, weight);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      int32_t* at = a.sums + (head + h) * padded + dim;
      for (int i = 0; i < 2; ++i) _mm512_storeu_si512(at + 16 * i, sums[h][i]);
    }
  }
};

constexpr TileTable kTable = ops::make_tile_table<Avx512Tiles>();

}  // namespace

const TileTable& tile_table_avx512vnni() { return kTable; }

}  // namespace edge
