#include "kernels/neuron_neon.h"

namespace edge {

EDGE_DECLARE_NEURON_TABLE(neon);
EDGE_NEURON_KERNELS(neon, Neon)

}  // namespace edge
