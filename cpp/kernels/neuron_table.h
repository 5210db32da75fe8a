// One ISA's neuron kernels, as the registry collects them; every ISA names its functions neuron_<op>_<format>_<isa>.
#pragma once

#include <type_traits>

#include "kernels/neuron.h"

namespace edge {

using NeuronAct = std::remove_pointer_t<NeuronActFn>;
using NeuronDot = std::remove_pointer_t<NeuronDotFn>;
using NeuronAxpy = std::remove_pointer_t<NeuronAxpyFn>;

#define EDGE_DECLARE_NEURON_TABLE(isa)                                                   \
  NeuronAct neuron_act_f16_##isa, neuron_act_q8_##isa;                                   \
  NeuronDot neuron_dot_f16_##isa, neuron_dot_q8_##isa, neuron_dot_q4_##isa;              \
  NeuronAxpy neuron_axpy_f16_##isa, neuron_axpy_q8_##isa, neuron_axpy_q4_##isa;          \
  inline constexpr NeuronKernels kNeuronTable_##isa = {                                  \
      {neuron_act_f16_##isa, neuron_act_q8_##isa, neuron_act_q8_##isa},                  \
      {neuron_dot_f16_##isa, neuron_dot_q8_##isa, neuron_dot_q4_##isa},                  \
      {neuron_axpy_f16_##isa, neuron_axpy_q8_##isa, neuron_axpy_q4_##isa}}

}  // namespace edge
