#include "core/cpu.h"

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define EDGE_X86 1
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edge {
namespace {

#if defined(EDGE_X86)
struct CpuidBits {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_ecx = 0;
  uint32_t leaf7_edx = 0;
  uint32_t leaf7_1_eax = 0;
  uint64_t xcr0 = 0;  // register state the OS saves on a context switch
};

CpuidBits read_cpuid() {
  CpuidBits bits;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0) bits.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
    bits.leaf7_ebx = ebx;
    bits.leaf7_ecx = ecx;
    bits.leaf7_edx = edx;
    // eax: the last subleaf there is.
    if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) bits.leaf7_1_eax = eax;
  }
  constexpr uint32_t kOsxsave = 1u << 27;  // XGETBV faults without it
  if ((bits.leaf1_ecx & kOsxsave) != 0) {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    bits.xcr0 = (static_cast<uint64_t>(high) << 32) | low;
  }
  return bits;
}

std::string missing_avx2(const CpuidBits& bits) {
  if ((bits.leaf7_ebx & (1u << 5)) == 0) return "CPU lacks avx2";
  if ((bits.leaf1_ecx & (1u << 12)) == 0) return "CPU lacks fma";
  if ((bits.leaf1_ecx & (1u << 29)) == 0) return "CPU lacks f16c";
  if ((bits.xcr0 & 0x6) != 0x6) return "the OS does not save AVX registers";
  return "";
}

std::string missing_avx_vnni(const CpuidBits& bits) {
  std::string missing = missing_avx2(bits);
  if (!missing.empty()) return missing;
  return (bits.leaf7_1_eax & (1u << 4)) == 0 ? "CPU lacks avx_vnni" : "";
}

std::string missing_avx512_vnni(const CpuidBits& bits) {
  std::string missing = missing_avx2(bits);
  if (!missing.empty()) return missing;
  if ((bits.leaf7_ebx & (1u << 16)) == 0) return "CPU lacks avx512f";
  if ((bits.leaf7_ebx & (1u << 17)) == 0) return "CPU lacks avx512dq";
  if ((bits.leaf7_ebx & (1u << 30)) == 0) return "CPU lacks avx512bw";
  if ((bits.leaf7_ebx & (1u << 31)) == 0) return "CPU lacks avx512vl";
  if ((bits.leaf7_ecx & (1u << 11)) == 0) return "CPU lacks avx512_vnni";
  if ((bits.xcr0 & 0xe6) != 0xe6) return "the OS does not save AVX-512 registers";
  return "";
}

// Asks Linux (5.16 or newer) for the tiles; until then their first use is an illegal instruction.
std::string ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;  // arch/x86/include/uapi/asm/prctl.h
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0) return "";
  if (errno == ENOSPC) return "a thread's sigaltstack is too small for AMX registers: the OS refuses them";
  return std::string("the OS refuses AMX registers: ") + std::strerror(errno);
#else
  return "no way to ask this OS for AMX registers";
#endif
}

std::string missing_amx_int8(const CpuidBits& bits) {
  std::string missing = missing_avx512_vnni(bits);
  if (!missing.empty()) return missing;
  if ((bits.leaf7_edx & (1u << 24)) == 0) return "CPU lacks amx_tile";
  if ((bits.leaf7_edx & (1u << 25)) == 0) return "CPU lacks amx_int8";
  if ((bits.xcr0 & 0x60000) != 0x60000) return "the OS does not save AMX registers";
  // Palette 1: eight tiles of 16 rows x 64 bytes.
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(0x1d, 1, &eax, &ebx, &ecx, &edx) == 0 || ebx != (8u << 16 | 64u) || (ecx & 0xffffu) != 16) {
    return "CPU has AMX tiles of another shape";
  }
  static const std::string refusal = ask_for_tiles();
  return refusal;
}
#endif

#if defined(__aarch64__)
#if defined(__linux__)
std::string missing_dotprod() {
  constexpr unsigned long kHwcapAsimdDp = 1ul << 20;  // arch/arm64/include/uapi/asm/hwcap.h
  return (getauxval(AT_HWCAP) & kHwcapAsimdDp) == 0 ? "CPU lacks asimddp" : "";
}
std::string missing_i8mm() {
  constexpr unsigned long kHwcap2I8mm = 1ul << 13;
  return (getauxval(AT_HWCAP2) & kHwcap2I8mm) == 0 ? "CPU lacks i8mm" : "";
}
#elif defined(__APPLE__)
std::string missing_feature(const char* key, const char* name) {
  int has = 0;
  size_t bytes = sizeof has;
  if (sysctlbyname(key, &has, &bytes, nullptr, 0) == 0 && has != 0) return "";
  return std::string("CPU lacks ") + name;
}
std::string missing_dotprod() { return missing_feature("hw.optional.arm.FEAT_DotProd", "asimddp"); }
std::string missing_i8mm() { return missing_feature("hw.optional.arm.FEAT_I8MM", "i8mm"); }
#else
std::string missing_dotprod() { return "no way to ask this OS for asimddp"; }
std::string missing_i8mm() { return "no way to ask this OS for i8mm"; }
#endif

std::string missing_neon_i8mm() {
  std::string missing = missing_dotprod();
  return missing.empty() ? missing_i8mm() : missing;
}
#endif

}  // namespace

std::string cpu_missing(CpuLevel level) {
  switch (level) {
    case CpuLevel::kBaseline: return "";
#if defined(EDGE_X86)
    case CpuLevel::kAvx2: return missing_avx2(read_cpuid());
    case CpuLevel::kAvxVnni: return missing_avx_vnni(read_cpuid());
    case CpuLevel::kAvx512Vnni: return missing_avx512_vnni(read_cpuid());
    case CpuLevel::kAmxInt8: return missing_amx_int8(read_cpuid());
#else
    case CpuLevel::kAvx2:
    case CpuLevel::kAvxVnni:
    case CpuLevel::kAvx512Vnni:
    case CpuLevel::kAmxInt8: return "not an x86 CPU";
#endif
#if defined(__aarch64__)
    case CpuLevel::kNeon: return "";
    case CpuLevel::kNeonDotprod: return missing_dotprod();
    case CpuLevel::kNeonI8mm: return missing_neon_i8mm();
#else
    case CpuLevel::kNeon:
    case CpuLevel::kNeonDotprod:
    case CpuLevel::kNeonI8mm: return "not an aarch64 CPU";
#endif
  }
  return "unknown level";
}

}  // namespace edge
