// Floats and halves of NEON.
// Internal linkage: compiled only into files with this ISA's flags.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace edge {
namespace {

struct NeonIsa {
  static constexpr int kLanes = 4;
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t IVec __attribute__((vector_size(16)));
  static constexpr int kScoreHeads = 4;
  static constexpr int kValueHeads = 2;
  static constexpr int kValueChunks = 2;
  static constexpr int kValueSums = 4;

  static Vec from_f16(const uint16_t* p) {
    return reinterpret_cast<Vec>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
  }
  static uint32_t bits(IVec on) { return vaddvq_u32(reinterpret_cast<uint32x4_t>(on & IVec{1, 2, 4, 8})); }
  static void to_f16(Vec v, uint16_t* p) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(reinterpret_cast<float32x4_t>(v))));
  }
};

}  // namespace
}  // namespace edge
