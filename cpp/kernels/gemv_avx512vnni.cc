#include "kernels/gemv_lanes_avx512vnni.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_BLOCK32, avx512vnni)

}  // namespace edge
