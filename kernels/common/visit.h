#pragma once

#include "kernels/common/dtype.h"
#include "kernels/common/half.h"
#include "kernels/common/host_device.h"

namespace moq {

/// Turns a run-time floating-point dtype into a type: calls visitor(float{}), visitor(Float16{}) or
/// visitor(BFloat16{}). Callers have checked that `dtype` is one of the three.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the visitor runs where its caller runs
#endif
template <typename Visitor>
MOQ_HOST_DEVICE inline decltype(auto) visit_float(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat16:
      return visitor(Float16{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    default:
      return visitor(float{});
  }
}

constexpr bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

}  // namespace moq
