#include "kernels/amx_model.h"
#include "kernels/gemv_lanes_amx.h"

namespace edge {

EDGE_DECLARE_QUANTISED_GEMV(amx_model);

namespace {
using Tiles = AmxModel;
}

EDGE_Q8X256_FORMATS(EDGE_GEMV_AMX256, amx_model)

}  // namespace edge
