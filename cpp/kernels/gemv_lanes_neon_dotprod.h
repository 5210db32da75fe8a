// ARMv8.2 with dot products. Internal linkage: only the _neon_dotprod files include this.
#pragma once

#include "kernels/gemv_sdot.h"

namespace edge {

EDGE_DECLARE_QUANTISED_GEMV(neon_dotprod);

namespace {

using Lanes = NeonLanes<Sdot>;

}  // namespace
}  // namespace edge
