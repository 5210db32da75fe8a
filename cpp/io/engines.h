// The engines behind open_reader.
#pragma once

#include <memory>

#include "io/block_reader.h"
#include "io/fault_plan.h"
#include "io/read_file.h"

namespace edge {

// ok() where io_uring can be used here; kUnsupported with the reason where not (old kernel, seccomp, sysctl).
Status uring_available();

Result<std::unique_ptr<BlockReader>> open_uring_reader(ReadFile file, FaultPlan faults, int depth);
Result<std::unique_ptr<BlockReader>> open_pread_reader(ReadFile file, FaultPlan faults, int depth);

}  // namespace edge
