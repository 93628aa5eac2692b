#pragma once

#include "kernels/common/adamw_math.h"
#include "kernels/cpu/isa.h"

/// What kernels/cpu/adamw.cpp asks of each instruction set: elements [begin, end) of one tensor, on
/// this thread.
namespace moq::kernels::cpu {

MOQ_FOR_EACH_ISA(void adamw_elements(const AdamWTensor& tensor, const AdamWFactors& factors,
                                     std::int64_t begin, std::int64_t end);)

}  // namespace moq::kernels::cpu
