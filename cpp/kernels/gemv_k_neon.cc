#include "kernels/gemv_lanes_neon.h"

namespace edge {

EDGE_Q8X256_FORMATS(EDGE_GEMV_BLOCK256, neon)

}  // namespace edge
