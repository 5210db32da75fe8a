#include "kernels/gemv_lanes_avxvnni.h"

namespace edge {

EDGE_Q8X32_FORMATS(EDGE_GEMV_BLOCK32, avxvnni)

}  // namespace edge
