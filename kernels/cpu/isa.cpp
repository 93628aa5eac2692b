#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <string_view>

#include "kernels/common/check.h"

namespace moq::kernels::cpu {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) {
    return Isa::kAvx512;
  }
  if (avx2) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* variable = std::getenv("MOQ_CPU_ISA");
  if (variable == nullptr || *variable == '\0') {
    return best;
  }
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string_view(variable) == name_of(isa)) {
      MOQ_CHECK(isa <= best, "MOQ_CPU_ISA: this processor supports up to ", name_of(best), ", got ",
                variable);
      return isa;
    }
  }
  MOQ_CHECK(false, "MOQ_CPU_ISA: must be scalar, avx2 or avx512, got ", variable);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace moq::kernels::cpu
