// Integer products over tiles of keys and values: a register of dot products holds 8 tokens, or 8 dimensions.
#include "kernels/ops_isa_avx2.h"
#include "kernels/ops_tiles.h"

namespace edge {
namespace {

struct Avx2Tiles : Avx2Isa {
  static constexpr int kKeyHeads = 4;
  static constexpr int kValueHeads = 2;

  static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i_u*>(p)); }
  static void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i_u*>(p), v); }
  static __m256i word(const void* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm256_set1_epi32(bits);
  }
  // sum += dot of 4 bytes; `k` without a sign, and small enough that pairs fit 16 bits.
  static __m256i add_dot(__m256i sum, __m256i k, __m256i q) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(k, q), _mm256_set1_epi16(1)));
  }

  template <KvType kType, int kHeads>
  static void key_dots(const uint8_t* k, const int8_t* q, int64_t padded, const int32_t* q_sums, int32_t (*out)[16]) {
    for (int half = 0; half < 2; ++half) {
      __m256i sums[kHeads];
      for (int h = 0; h < kHeads; ++h) sums[h] = _mm256_set1_epi32(kType == KvType::kInt8 ? 0 : -8 * q_sums[h]);
      if constexpr (kType == KvType::kInt8) {
        for (int64_t d = 0; d < padded; d += 4) {
          // |k| times q with the sign of k.
          const __m256i keys = load(k + d * 16 + half * 32), size = _mm256_abs_epi8(keys);
          for (int h = 0; h < kHeads; ++h) {
            sums[h] = add_dot(sums[h], size, _mm256_sign_epi8(word(q + h * padded + d), keys));
          }
        }
      } else {
        const __m256i low = _mm256_set1_epi8(15);
        for (int64_t d = 0; d < padded; d += 32) {
          for (int64_t step = 0; step < 16; step += 4) {
            const __m256i keys = load(k + d * 8 + step * 16 + half * 32);
            const __m256i first = _mm256_and_si256(keys, low);
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(keys, 4), low);
            for (int h = 0; h < kHeads; ++h) {
              const int8_t* at = q + h * padded + d + step;
              sums[h] = add_dot(add_dot(sums[h], first, word(at)), second, word(at + 16));
            }
          }
        }
      }
      for (int h = 0; h < kHeads; ++h) store(out[h] + 8 * half, sums[h]);
    }
  }

  // 32 dims of two tokens as int16 pairs, 8 dims a register.
  template <KvType kType>
  static void load_pair(const uint8_t* v, __m256i* out) {
    for (int i = 0; i < (kType == KvType::kInt8 ? 4 : 2); ++i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(v + 16 * i));
      if constexpr (kType == KvType::kInt8) {
        out[i] = _mm256_cvtepi8_epi16(bytes);
      } else {
        const __m256i wide = _mm256_cvtepu8_epi16(bytes), offset = _mm256_set1_epi16(8);
        out[i] = _mm256_sub_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(15)), offset);
        out[2 + i] = _mm256_sub_epi16(_mm256_srli_epi16(wide, 4), offset);
      }
    }
  }

  template <KvType kType, int kHeads>
  static void value_dots(const TileArgs& a, int64_t head, int64_t dim) {
    const int64_t padded = a.layout.padded(), pair_bytes = a.layout.data_bytes() / 8;
    const int64_t offset = kType == KvType::kInt8 ? 2 * dim : dim;
    __m256i sums[kHeads][4];
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < 4; ++i) sums[h][i] = load(a.sums + (head + h) * padded + dim + 8 * i);
    }
    for (int64_t tile = 0; tile < a.n_tiles; ++tile) {
      const auto* v = reinterpret_cast<const uint8_t*>(a.tiles[tile]) + offset;
      const int16_t* w = a.weights + head * a.weight_stride + tile * kKvTileTokens;
      for (int i = 0; i < 8; ++i) {
        __m256i values[4];
        load_pair<kType>(v + i * pair_bytes, values);
        for (int h = 0; h < kHeads; ++h) {
          const __m256i weight = word(w + h * a.weight_stride + 2 * i);
          for (int j = 0; j < 4; ++j) {
            sums[h][j] = _mm256_add_epi32(sums[h][j], _mm256_madd_epi16(values[j], weight));
          }
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < 4; ++i) store(a.sums + (head + h) * padded + dim + 8 * i, sums[h][i]);
    }
  }
};

constexpr TileTable kTable = ops::make_tile_table<Avx2Tiles>();

}  // namespace

const TileTable& tile_table_avx2() { return kTable; }

}  // namespace edge
