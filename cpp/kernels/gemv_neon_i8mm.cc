#include "kernels/gemv_lanes_neon_i8mm.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_PAIRS32, neon_i8mm)

int64_t multiply_int8_neon_i8mm(int64_t n_steps) { return 2 * multiply_int8<Smmla>(n_steps); }

}  // namespace edge
