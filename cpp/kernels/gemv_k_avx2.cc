#include "kernels/gemv_lanes_avx2.h"

namespace edge {

EDGE_Q8X256_FORMATS(EDGE_GEMV_BLOCK256, avx2)

}  // namespace edge
