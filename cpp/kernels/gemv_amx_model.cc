#include "kernels/amx_model.h"
#include "kernels/gemv_lanes_amx.h"

namespace edge {

EDGE_DECLARE_QUANTISED_GEMV(amx_model);

namespace {
using Tiles = AmxModel;
}

EDGE_Q8X32_FORMATS(EDGE_GEMV_AMX32, amx_model)

int64_t multiply_int8_amx_model(int64_t n_steps) { return multiply_int8_tiles<Tiles>(n_steps); }

}  // namespace edge
