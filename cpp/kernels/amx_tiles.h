// Intel AMX: eight tile registers of 16 rows x 64 bytes and the products of two of them (Intel 64 and IA-32 Architectures
// Software Developer's Manual, volume 1 chapter 18; volume 2, LDTILECFG, TILELOADD, TDPBSSD). Kernels take the tiles as a
// type: `AmxHardware` here, or `AmxModel`, which does in memory what the instructions do (amx_model.h).
//
// Inline assembly, not intrinsics: GCC 12 takes _tile_loadconfig to read 8 bytes of the 64, and drops the other stores.
// Each statement clobbers memory, so the compiler moves no load or store of what tiles read and write across it; it uses
// no tile register itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

inline constexpr int kAmxTiles = 8;
inline constexpr int kAmxRows = 16;
inline constexpr int kAmxRowBytes = 64;

// What LDTILECFG reads. colsb: bytes of a row that count; a tile that is not used has 0 rows of 0 bytes.
struct AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  constexpr AmxConfig& set(int tile, int n_rows, int n_bytes) {
    rows[tile] = static_cast<uint8_t>(n_rows);
    colsb[tile] = static_cast<uint16_t>(n_bytes);
    return *this;
  }
};
static_assert(sizeof(AmxConfig) == 64 && offsetof(AmxConfig, colsb) == 16 && offsetof(AmxConfig, rows) == 48);

#if defined(__x86_64__)

struct AmxHardware {
  static void configure(const AmxConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
  static void release() { __asm__ volatile("tilerelease" : : : "memory"); }
  template <int tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile) : "memory");
  }
  // Rows `stride` bytes apart.
  template <int tile>
  static void load(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(void* rows, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
  }
  // sum[m][n] += left[m][4k + b] * right[k][4n + b]: int32 of signed bytes. The assembler takes operands last to first.
  template <int sum, int left, int right>
  static void multiply_add() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right) : "memory");
  }
};

#endif

// Tiles of one shape while it lives: a thread has its own, and gives them back so that the OS need not save them.
template <typename Tiles>
class AmxShape {
 public:
  explicit AmxShape(const AmxConfig& config) { Tiles::configure(config); }
  ~AmxShape() { Tiles::release(); }
  AmxShape(const AmxShape&) = delete;
  AmxShape& operator=(const AmxShape&) = delete;
};

}  // namespace edge
