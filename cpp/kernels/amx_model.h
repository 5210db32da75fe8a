// What AmxHardware's instructions do, in plain C++ over memory of the calling thread, by the operations that Intel's manual
// gives for each: so the kernels of AMX run, and are compared with ref, on CPUs without it. For tests.
#pragma once

#include <cstdint>

#include "kernels/amx_tiles.h"

namespace edge {

struct AmxModel {
  static void configure(const AmxConfig& config);
  static void release();
  template <int tile>
  static void zero() {
    zero(tile);
  }
  template <int tile>
  static void load(const void* rows, int64_t stride) {
    load(tile, rows, stride);
  }
  template <int tile>
  static void store(void* rows, int64_t stride) {
    store(tile, rows, stride);
  }
  template <int sum, int left, int right>
  static void multiply_add() {
    multiply_add(sum, left, right);
  }

  static void zero(int tile);
  static void load(int tile, const void* rows, int64_t stride);
  static void store(int tile, void* rows, int64_t stride);
  static void multiply_add(int sum, int left, int right);

  // The first instruction of this thread, since this was last asked, that a CPU would have refused (#GP, #UD); "" when
  // none. Such an instruction does nothing here.
  static const char* fault();
};

}  // namespace edge
