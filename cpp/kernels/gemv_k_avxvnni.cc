#include "kernels/gemv_lanes_avxvnni.h"

namespace edge {

EDGE_Q8X256_FORMATS(EDGE_GEMV_BLOCK256, avxvnni)

}  // namespace edge
