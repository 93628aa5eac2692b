#pragma once

#include <cstdint>
#include <span>

#include "kernels/common/dtype.h"

struct CUstream_st;

namespace moq::kernels {

/// One parameter of a multi-tensor AdamW, and what is kept of it.
struct AdamWTensor {
  void* parameter = nullptr;       ///< [size], parameter_dtype, updated
  const void* gradient = nullptr;  ///< [size], gradient_dtype
  void* exp_avg = nullptr;         ///< [size], parameter_dtype, updated: the first moment
  void* exp_avg_sq = nullptr;      ///< likewise: the second
  float* step = nullptr;           ///< [1]: completed steps; this one is added
  std::int64_t size = 0;
  DType parameter_dtype = DType::kFloat32;
  /// float32, float16 or bfloat16 beside a float32 parameter, else the parameter's.
  DType gradient_dtype = DType::kFloat32;
};

/// One step of AdamW for many tensors. With t = step + 1 and g = gradient / grad_scale, or its
/// negative (maximize):
///
///   parameter  -= learning_rate * weight_decay * parameter
///   exp_avg     = beta1 * exp_avg + (1 - beta1) * g
///   exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g * g
///   parameter  -= learning_rate / (1 - beta1^t) * exp_avg
///                 / (sqrt(exp_avg_sq / (1 - beta2^t)) + epsilon)
///
/// Elements are computed in float32, every operation rounded once, and stored in their dtype;
/// factors that all elements of a tensor share are computed in float64 and rounded once. The
/// gradients are only read. Source: Loshchilov and Hutter, "Decoupled weight decay regularization",
/// ICLR 2019, in the form of torch's fused AdamW.
///
/// Tensors overlap nothing, and no two have one step. Without a weight_decay infinite parameters
/// stay.
struct AdamWArgs {
  std::span<const AdamWTensor> tensors;  ///< host memory
  double learning_rate = 0.0;
  const float* learning_rate_tensor = nullptr;  ///< [1]: taken instead, where the tensors are
  double beta1 = 0.0;                           ///< in [0, 1)
  double beta2 = 0.0;                           ///< in [0, 1)
  double weight_decay = 0.0;
  double epsilon = 0.0;
  bool maximize = false;
  const float* grad_scale = nullptr;  ///< [1], where the tensors are; null: 1
  /// [1], likewise; non-zero: nothing is written (a step whose gradients overflowed); null: never.
  const float* found_inf = nullptr;
};

namespace cpu {
/// All pointers are host memory. Runs on up to num_threads() threads; every instruction set gives
/// the same numbers.
/// @throws moq::Error for a dtype or a pair of dtypes that is not among those above, a beta that is
///         not in [0, 1), a negative size, or a null pointer; nothing has been written then.
void adamw(const AdamWArgs& args);
}  // namespace cpu

namespace cuda {
/// Tensor data, steps and the pointers of the arguments are memory of the current device.
///
/// One launch carries up to 576 tensors of the same dtypes; what describes them travels by value in
/// its parameters, so that nothing on the host must outlive the call, and a captured graph owns it.
/// One more launch adds the steps.
/// @throws moq::Error as on the CPU, and if a launch fails.
void adamw(const AdamWArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
