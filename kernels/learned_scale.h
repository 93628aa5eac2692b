#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/fake_quantize.h"

struct CUstream_st;

namespace moq::kernels {

/// What fake_quantize simulates with given scales (ScaleRule::kGiven), and where its derivative is
/// taken: that of a surrogate in which rounding adds a constant. With s = |absmax| / qmax, v =
/// weight / s and r = blend_ratio
///
///   |rint(v)| <= qmax   grid = weight + s * (rint(v) - v)   d weight = 1, d s = rint(v) - v
///   beyond              grid = sign(v) * qmax * s            d weight = 0, d s = sign(v) * qmax
///
///   output = r * weight + (1 - r) * grid
///
/// Source: Esser et al., "Learned step size quantization", ICLR 2020, without their factor. With
/// num_bits == 0 the output is the weight. A NaN in the weight, or an absmax that is not finite,
/// makes the derivative by that absmax a NaN.
struct LearnedScale {
  /// One that fake_quantize takes, without its outputs: rounded to nearest, scale_rule kGiven, and
  /// rows or columns contiguous.
  FakeQuantizeTensor matrix = {};
  const std::int32_t* num_bits = nullptr;  ///< [1], in [2, 16] or 0
  const float* blend_ratio = nullptr;      ///< [1], in [0, 1]; null: 0
};

/// The gradient: from that of the output to those of weight and absmax.
///
/// Sums over a group are float32, in an order that depends on its shape alone: of up to 512
/// neighbouring columns of one row, column i is added to sum i % 64, and the 64 sums are added in
/// halves; what that gives of a group is summed in the same way until one number is left. CPU
/// (every instruction set) and CUDA give the same numbers.
struct LearnedScaleGradientArgs {
  LearnedScale point;
  const void* grad_output = nullptr;  ///< [rows, cols], the weight's strides and dtype
  void* grad_weight = nullptr;        ///< likewise, written; null: not written
  float* grad_absmax = nullptr;       ///< [num_groups], written
  /// CUDA only: device memory of learned_scale_workspace_size bytes, for this call alone; may be
  /// null if that size is 0.
  void* workspace = nullptr;
};

/// The derivative along a direction of weight and absmax, of which the gradient is the adjoint.
struct LearnedScaleTangentArgs {
  LearnedScale point;
  const void* weight_tangent = nullptr;   ///< [rows, cols], the weight's strides and dtype
  const float* absmax_tangent = nullptr;  ///< [num_groups]
  void* output_tangent = nullptr;         ///< [rows, cols], likewise, written
};

namespace cpu {
/// All pointers are host memory. Runs on up to num_threads() threads.
/// @throws moq::Error as fake_quantize, for another rounding or rule, scattered rows and columns,
///         or a pointer that is missing.
void learned_scale_gradient(const LearnedScaleGradientArgs& args);
/// Likewise.
void learned_scale_tangent(const LearnedScaleTangentArgs& args);
}  // namespace cpu

namespace cuda {
/// Bytes of LearnedScaleGradientArgs::workspace.
std::size_t learned_scale_workspace_size(const FakeQuantizeTensor& matrix);

/// All pointers are memory of the current device. The host cannot check a width: one without a grid
/// gives NaNs.
/// @throws moq::Error for all else that the CPU refuses, a missing workspace, and if a launch
///         fails.
void learned_scale_gradient(const LearnedScaleGradientArgs& args, CUstream_st* stream);
/// Likewise.
void learned_scale_tangent(const LearnedScaleTangentArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
