// Which instruction set levels this CPU and this OS can run. Compiled without any ISA flag.
#pragma once

#include <string>

namespace edge {

enum class CpuLevel {
  kBaseline,      // what the compiler's target promises
  kAvx2,          // AVX2 + FMA + F16C, ymm state saved by the OS
  kAvxVnni,       // AVX-VNNI on top of kAvx2
  kAvx512Vnni,    // AVX-512 F/BW/VL/DQ + VNNI on top of kAvx2, zmm state saved by the OS
  kAmxInt8,       // AMX tiles of int8 on top of kAvx512Vnni, which the OS lets this process use
  kNeon,          // ARMv8.0: every aarch64 CPU
  kNeonDotprod,   // ARMv8.2 dot product
  kNeonI8mm,      // ARMv8.6 int8 matrix product on top of kNeonDotprod
};

// Empty when the level can run here, else what is missing ("CPU lacks avx512_vnni"). Of AMX the process has to ask the OS
// for registers: it does once, the first time that this is called for it, for all its threads and children.
std::string cpu_missing(CpuLevel level);

}  // namespace edge
