#pragma once

namespace moq::kernels::cpu {

/// Instruction sets that the CPU kernels are compiled for, weakest first.
enum class Isa { kScalar, kAvx2, kAvx512 };

/// The instruction set that kernels run with: the best this processor has, or the one that the
/// environment variable MOQ_CPU_ISA (scalar, avx2, avx512) names, read once.
/// avx2 means AVX2 + FMA + F16C; avx512 means AVX-512 F, BW, DQ, VL and VNNI on top.
/// @throws moq::Error if MOQ_CPU_ISA names something else, or more than the processor has.
Isa active_isa();

/// "scalar", "avx2" or "avx512".
const char* name_of(Isa isa);

}  // namespace moq::kernels::cpu

/// Calls FUNCTION (the same name in namespaces scalar, avx2 and avx512, made by compiling one file
/// of kernels/cpu/simd/ once per instruction set) with the arguments, for the active instruction
/// set.
#define MOQ_DISPATCH_ISA(FUNCTION, ...)          \
  [&]() -> decltype(auto) {                      \
    switch (::moq::kernels::cpu::active_isa()) { \
      case ::moq::kernels::cpu::Isa::kAvx512:    \
        return avx512::FUNCTION(__VA_ARGS__);    \
      case ::moq::kernels::cpu::Isa::kAvx2:      \
        return avx2::FUNCTION(__VA_ARGS__);      \
      default:                                   \
        return scalar::FUNCTION(__VA_ARGS__);    \
    }                                            \
  }()

/// Declares functions once in each of the namespaces that MOQ_DISPATCH_ISA chooses from.
#define MOQ_FOR_EACH_ISA(...) \
  namespace scalar {          \
  __VA_ARGS__                 \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__                 \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__                 \
  }
