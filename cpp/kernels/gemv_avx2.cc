#include "kernels/gemv_lanes_avx2.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_BLOCK32, avx2)

int64_t multiply_int8_avx2(int64_t n_steps) { return multiply_int8<Lanes>(n_steps); }

}  // namespace edge
