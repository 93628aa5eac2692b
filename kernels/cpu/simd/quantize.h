#pragma once

#include "kernels/quantize.h"

/// What kernels/cpu/quantize.cpp asks of each instruction set: all rows of `args`, on this thread.
namespace moq::kernels::cpu {

#define MOQ_DECLARE_QUANTIZE(ISA)                               \
  namespace ISA {                                               \
  void quantize_activation(const QuantizeActivationArgs& args); \
  void row_absmax(const RowAbsmaxArgs& args);                   \
  }
MOQ_DECLARE_QUANTIZE(scalar)
MOQ_DECLARE_QUANTIZE(avx2)
MOQ_DECLARE_QUANTIZE(avx512)
#undef MOQ_DECLARE_QUANTIZE

}  // namespace moq::kernels::cpu
