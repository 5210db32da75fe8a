// Whether one ISA's matrix products give another's bits on this machine, seen on a few of every kind.
#pragma once

#include <string>

#include "kernels/gemv_table.h"

namespace edge {

// Empty, or the first format whose products differ ("q4_k products"). One or two milliseconds.
std::string gemv_difference(const GemvTable& found, const GemvTable& expected);

}  // namespace edge
