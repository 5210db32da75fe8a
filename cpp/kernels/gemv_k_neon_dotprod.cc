#include "kernels/gemv_lanes_neon_dotprod.h"

namespace edge {

EDGE_Q8X256_FORMATS(EDGE_GEMV_BLOCK256, neon_dotprod)

}  // namespace edge
