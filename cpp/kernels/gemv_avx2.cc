#include "kernels/gemv_lanes_avx2.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_BLOCK32, avx2)

}  // namespace edge
