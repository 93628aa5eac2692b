#pragma once

#include <gtest/gtest.h>

#include "kernels/cpu/isa.h"

/// Instruction sets as a test parameter.
namespace moq::kernels::testing {

inline const auto kIsas = ::testing::Values(cpu::Isa::kScalar, cpu::Isa::kAvx2, cpu::Isa::kAvx512);

}  // namespace moq::kernels::testing

#define MOQ_SKIP_WITHOUT_ISA(ISA)                                                       \
  do {                                                                                  \
    if ((ISA) > ::moq::kernels::cpu::active_isa()) {                                    \
      GTEST_SKIP() << ::moq::kernels::cpu::name_of(ISA) << " was not tested: this run " \
                   << "(processor, MOQ_CPU_ISA) has up to "                             \
                   << ::moq::kernels::cpu::name_of(::moq::kernels::cpu::active_isa());  \
    }                                                                                   \
  } while (false)

/// FUNCTION of the instruction set that the expression ISA names.
#define MOQ_FUNCTION_OF(ISA, FUNCTION)                                                 \
  ((ISA) == ::moq::kernels::cpu::Isa::kScalar ? &::moq::kernels::cpu::scalar::FUNCTION \
   : (ISA) == ::moq::kernels::cpu::Isa::kAvx2 ? &::moq::kernels::cpu::avx2::FUNCTION   \
                                              : &::moq::kernels::cpu::avx512::FUNCTION)
