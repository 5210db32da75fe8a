// AVX-VNNI: vpdpbusd on the ymm of AVX2, for CPUs without AVX-512. Internal linkage: only the _avxvnni files include
// this.
#pragma once

#include "kernels/gemv_lanes_vnni.h"
#include "kernels/gemv_ymm.h"

namespace edge {

EDGE_DECLARE_QUANTISED_GEMV(avxvnni);

namespace {

struct YmmVnni : Ymm {
  static inline Words dot4(Words sum, Words values, Words acts) { return _mm256_dpbusd_avx_epi32(sum, values, acts); }
  static inline Words dot_pairs(Words sum, Words a, Words b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
};

using Lanes = Vnni<YmmVnni>;

}  // namespace
}  // namespace edge
