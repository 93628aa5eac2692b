#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/norm.h"

/// What kernels/cpu/norm.cpp asks of each instruction set: parts of the work that one thread does,
/// without checks.
namespace moq::kernels::cpu {

// clang-format off
MOQ_FOR_EACH_ISA(
  void layer_norm_rows(const LayerNormArgs& args, std::int64_t begin, std::int64_t end);
  void rms_norm_rows(const RmsNormArgs& args, std::int64_t begin, std::int64_t end);
)
// clang-format on

}  // namespace moq::kernels::cpu
