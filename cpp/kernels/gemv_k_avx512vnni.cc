#include "kernels/gemv_lanes_avx512vnni.h"

namespace edge {

EDGE_Q8X256_FORMATS(EDGE_GEMV_BLOCK256, avx512vnni)

}  // namespace edge
