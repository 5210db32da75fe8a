#include "kernels/ops_impl.h"
#include "kernels/ops_isa_avx512vnni.h"

namespace edge {
namespace {

constexpr OpsTable kTable = ops::make_table<Avx512Isa>();

}  // namespace

const OpsTable& ops_table_avx512vnni() { return kTable; }

}  // namespace edge
