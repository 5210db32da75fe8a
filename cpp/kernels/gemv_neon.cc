#include "kernels/gemv_lanes_neon.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_BLOCK32, neon)

}  // namespace edge
