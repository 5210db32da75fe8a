// The float operators for any machine: plain vector code, and f16 conversion spelled out in bits.
#include "kernels/ops_impl.h"
#include "kernels/ops_isa_ref.h"

namespace edge {
namespace {

constexpr OpsTable kTable = ops::make_table<RefIsa>();

}  // namespace

const OpsTable& ops_table_ref() { return kTable; }

}  // namespace edge
