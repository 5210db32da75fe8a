#include <cstdlib>

#include "core/cpu.h"
#include "kernels/gemv_check.h"
#include "kernels/gemv_table.h"
#include "kernels/kernels.h"
#include "kernels/neuron_table.h"
#include "kernels/ops_table.h"
#include "kernels/registry.h"

namespace edge {

EDGE_DECLARE_GEMV_TABLE(ref);
EDGE_DECLARE_NEURON_TABLE(ref);
#if defined(__x86_64__)
EDGE_DECLARE_GEMV_TABLE(avx2);
EDGE_DECLARE_GEMV_TABLE_OVER(avxvnni, avx2);
EDGE_DECLARE_GEMV_TABLE(avx512vnni);
EDGE_DECLARE_GEMV_TABLE_OVER(amx, avx512vnni);
EDGE_DECLARE_GEMV_TABLE_OVER(amx_model, avx512vnni);
EDGE_DECLARE_NEURON_TABLE(avx2);
EDGE_DECLARE_NEURON_TABLE(avx512vnni);
#elif defined(__aarch64__)
EDGE_DECLARE_GEMV_TABLE(neon);
EDGE_DECLARE_GEMV_TABLE_OVER(neon_dotprod, neon);
EDGE_DECLARE_GEMV_TABLE_OVER(neon_i8mm, neon);
EDGE_DECLARE_NEURON_TABLE(neon);
EDGE_DECLARE_NEURON_TABLE(neon_dotprod);
#endif

namespace {

struct Isa {
  const char* name;
  CpuLevel level;
  const GemvTable* gemv;
  // Joined on first use: even naming an ISA's tables may run its instructions.
  const Kernels& (*kernels)();
};

Kernels join(const char* isa, const GemvTable& gemv, const NeuronKernels& neuron, const OpsTable& ops,
             const TileTable& tiles) {
  Kernels kernels = {};
  kernels.isa = isa;
  for (int i = 0; i < kTileFormats; ++i) kernels.gemv[i] = gemv.gemv[i];
  kernels.neuron = neuron;
  kernels.quantize_q8x32 = gemv.quantize_q8x32;
  kernels.quantize_q8x256 = gemv.quantize_q8x256;
  kernels.rms_norm = ops.rms_norm;
  kernels.layer_norm = ops.layer_norm;
  kernels.rope = ops.rope;
  kernels.silu_mul = ops.silu_mul;
  kernels.relu_mul = ops.relu_mul;
  kernels.gelu_mul = ops.gelu_mul;
  kernels.gelu_tanh_mul = ops.gelu_tanh_mul;
  kernels.add = ops.add;
  kernels.scale_add = ops.scale_add;
  kernels.beyond = ops.beyond;
  kernels.softmax = ops.softmax;
  kernels.attention_begin = ops.attention_begin;
  kernels.attention_scores = ops.attention_scores;
  kernels.attention_weigh = ops.attention_weigh;
  kernels.attention_values = ops.attention_values;
  kernels.to_f16 = ops.to_f16;
  kernels.tiles = tiles;
  return kernels;
}

// Of matrix products and activation quantisers every ISA has its own table; `dots` has the other integer products, `ops`
// what is float throughout.
#define EDGE_ISA(level, isa, dots, ops)                                                                     \
  Isa {                                                                                                     \
    #isa, CpuLevel::level, &kGemvTable_##isa, []() -> const Kernels& {                                      \
      static const Kernels kernels =                                                                        \
          join(#isa, kGemvTable_##isa, kNeuronTable_##dots, ops_table_##ops(), tile_table_##dots());        \
      return kernels;                                                                                       \
    }                                                                                                       \
  }

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    EDGE_ISA(kAmxInt8, amx, avx512vnni, avx512vnni),
    EDGE_ISA(kAvx512Vnni, avx512vnni, avx512vnni, avx512vnni),
    EDGE_ISA(kAvxVnni, avxvnni, avx2, avx2),
    EDGE_ISA(kAvx2, avx2, avx2, avx2),
    EDGE_ISA(kAvx512Vnni, amx_model, avx512vnni, avx512vnni),  // never the best: where it runs, avx512vnni does
#elif defined(__aarch64__)
    EDGE_ISA(kNeonI8mm, neon_i8mm, neon_dotprod, neon),
    EDGE_ISA(kNeonDotprod, neon_dotprod, neon_dotprod, neon),
    EDGE_ISA(kNeon, neon, neon, neon),
#endif
    EDGE_ISA(kBaseline, ref, ref, ref),
};

#undef EDGE_ISA

#if defined(__x86_64__)
// This machine's tiles, which may be of a kind that nobody has tried, against its vectors, once: a table that is wrong
// must not be there to be chosen.
const std::string& tiles_differ() {
  static const std::string difference = gemv_difference(kGemvTable_amx, kGemvTable_avx512vnni);
  return difference;
}
#endif

// Empty when the ISA can run here, else why not.
std::string missing(const Isa& isa) {
  std::string reason = cpu_missing(isa.level);
#if defined(__x86_64__)
  if (reason.empty() && isa.level == CpuLevel::kAmxInt8 && !tiles_differ().empty()) {
    reason = "this CPU's AMX fails the self-check: " + tiles_differ();
  }
#endif
  return reason;
}

Result<const Isa*> find(const std::string& name) {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (name == isa.name) {
      const std::string reason = missing(isa);
      if (reason.empty()) return &isa;
      return error(Code::kUnsupported, "ISA %s cannot run here: %s", name.c_str(), reason.c_str());
    }
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  return error(Code::kBadArgument, "unknown ISA '%s': expected one of %s", name.c_str(), names.c_str());
}

}  // namespace

std::vector<IsaInfo> list_isas() {
  std::vector<IsaInfo> infos;
  for (const Isa& isa : kIsas) {
    std::string reason = missing(isa);
    infos.push_back({isa.name, reason.empty(), std::move(reason)});
  }
  return infos;
}

Result<const Kernels*> kernels_for(const std::string& name) {
  EDGE_ASSIGN(const Isa* isa, find(name));
  return &isa->kernels();
}

Result<const Kernels*> default_kernels() {
  const char* forced = std::getenv("EDGE_ISA");
  if (forced != nullptr && forced[0] != '\0') {
    Result<const Kernels*> kernels = kernels_for(forced);
    if (!kernels.ok()) return error(kernels.status().code(), "EDGE_ISA: %s", kernels.status().message().c_str());
    return kernels;
  }
  for (const Isa& isa : kIsas) {
    if (missing(isa).empty()) return &isa.kernels();
  }
  return error(Code::kUnsupported, "no ISA of this build runs on this CPU");
}

Result<const GemvTable*> gemv_table_for(const std::string& name) {
  EDGE_ASSIGN(const Isa* isa, find(name));
  return isa->gemv;
}

}  // namespace edge
