#include "kernels/ops_impl.h"
#include "kernels/ops_isa_neon.h"

namespace edge {
namespace {

constexpr OpsTable kTable = ops::make_table<NeonIsa>();

}  // namespace

const OpsTable& ops_table_neon() { return kTable; }

}  // namespace edge
