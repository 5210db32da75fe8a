#include <arm_neon.h>

#include "kernels/gemv_float.h"
#include "kernels/gemv_table.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(neon);

namespace {

struct Neon {
  using V = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kMaxRows = 3;  // x 2 vectors x 4 chains = 24 of 32 registers
  static constexpr int kPartVectors = 2;
  static constexpr int64_t kPrefetchBytes = 2048;

  static inline V load(const float* p) { return vld1q_f32(p); }
  static inline void store(float* p, V v) { vst1q_f32(p, v); }
  static inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static inline V add(V a, V b) { return vaddq_f32(a, b); }
  static inline V set1(float x) { return vdupq_n_f32(x); }
};

struct F32 {
  static constexpr int64_t kBytes = 4;
  static inline float32x4_t load(const uint8_t* p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
};
struct F16 {
  static constexpr int64_t kBytes = 2;
  static inline float32x4_t load(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
};
struct BF16 {
  static constexpr int64_t kBytes = 2;
  static inline float32x4_t load(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
};

}  // namespace

EDGE_GEMV(gemv_f32_neon, run_float_tiles<Neon, F32>)
EDGE_GEMV(gemv_f16_neon, run_float_tiles<Neon, F16>)
EDGE_GEMV(gemv_bf16_neon, run_float_tiles<Neon, BF16>)

}  // namespace edge
