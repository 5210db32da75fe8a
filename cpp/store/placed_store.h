// Every weight where the plan put it: resident, streamed or read on demand, behind one WeightStore.
#pragma once

#include <memory>
#include <string>

#include "core/budget.h"
#include "store/weight_store.h"

namespace edge {

// Checks the plan against the directory, reads the resident weights, starts the stream.
// kBadArgument when the plan does not fit the pack, kOverBudget, kDiskError, kCorrupt, kCancelled.
// The directory and the budget must outlive the store.
Result<std::unique_ptr<WeightStore>> open_store(const std::string& path, const PackDirectory& directory,
                                                const StorePlan& plan, const StoreOptions& options, Budget& budget);

}  // namespace edge
