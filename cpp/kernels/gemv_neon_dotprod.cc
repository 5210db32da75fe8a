#include "kernels/gemv_lanes_neon_dotprod.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_BLOCK32, neon_dotprod)

int64_t multiply_int8_neon_dotprod(int64_t n_steps) { return multiply_int8<Lanes>(n_steps); }

}  // namespace edge
