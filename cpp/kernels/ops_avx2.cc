#include "kernels/ops_impl.h"
#include "kernels/ops_isa_avx2.h"

namespace edge {
namespace {

constexpr OpsTable kTable = ops::make_table<Avx2Isa>();

}  // namespace

const OpsTable& ops_table_avx2() { return kTable; }

}  // namespace edge
