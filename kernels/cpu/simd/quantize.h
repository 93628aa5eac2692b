#pragma once

#include "kernels/quantize.h"

/// What kernels/cpu/quantize.cpp asks of each instruction set, on this thread: all rows of `args`,
/// or those from `begin` to `end`.
namespace moq::kernels::cpu {

#define MOQ_DECLARE_QUANTIZE(ISA)                                                     \
  namespace ISA {                                                                     \
  void quantize_activation(const QuantizeActivationArgs& args);                       \
  void row_extents(const RowExtentsArgs& args, std::int64_t begin, std::int64_t end); \
  }
MOQ_DECLARE_QUANTIZE(scalar)
MOQ_DECLARE_QUANTIZE(avx2)
MOQ_DECLARE_QUANTIZE(avx512)
#undef MOQ_DECLARE_QUANTIZE

}  // namespace moq::kernels::cpu
