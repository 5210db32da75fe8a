#include "kernels/amx_tiles.h"
#include "kernels/gemv_lanes_amx.h"

namespace edge {

EDGE_DECLARE_QUANTISED_GEMV(amx);

namespace {
using Tiles = AmxHardware;
}

EDGE_Q8X256_FORMATS(EDGE_GEMV_AMX256, amx)

}  // namespace edge
