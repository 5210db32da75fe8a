#include "kernels/neuron_neon.h"

namespace edge {
namespace {

constexpr QuantizeQ8x32* quantize_q8x32_neon_dotprod = quantize_q8x32_neon;

}  // namespace

EDGE_DECLARE_NEURON_TABLE(neon_dotprod);
EDGE_NEURON_KERNELS(neon_dotprod, Neon)

}  // namespace edge
