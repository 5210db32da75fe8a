// What tests and benchmarks see beyond kernels.h.
#pragma once

#include <string>

#include "core/status.h"
#include "kernels/gemv_table.h"

namespace edge {

// The matrix part of one ISA, with its plain read loop; fails as kernels_for does.
Result<const GemvTable*> gemv_table_for(const std::string& isa);

}  // namespace edge
