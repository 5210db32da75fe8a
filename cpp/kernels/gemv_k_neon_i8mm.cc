#include "kernels/gemv_lanes_neon_i8mm.h"

namespace edge {

EDGE_Q8X256_FORMATS(EDGE_GEMV_PAIRS256, neon_i8mm)

}  // namespace edge
