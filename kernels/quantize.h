#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/fake_quantize.h"
#include "kernels/quant_grid.h"

struct CUstream_st;

namespace moq::kernels {

/// Quantizes activations to INT8, the grids of the INT8 x INT8 matrix products:
///
///   symmetric    codes = clamp(rint(input * (1 / scale)), -127, 127)
///   asymmetric   codes = clamp(rint(input * (1 / scale)) + zero_point, -128, 127)
///   output = (codes - zero_point) * scale
///
/// Dynamic (static_scale is null): one scale, and one zero point, per row (token), float32, as
/// quant_grid.h defines them by the row's absmax or its lowest and highest element; a row of zeros
/// has the smallest scale and output 0; a row that holds a NaN or an infinity has scale NaN, zero
/// point 0, codes 0 and output NaN. Static: one given scale and zero point, and a NaN element has
/// code 0 and output NaN; a given scale that is not finite or below min_scale(float32) has no grid,
/// nor has a zero point outside [-128, 127]. The output never holds a negative zero.
struct QuantizeActivationArgs {
  const void* input = nullptr;          ///< [rows, cols], rows contiguous, input_dtype
  std::int8_t* codes = nullptr;         ///< [rows, cols] contiguous; null: not written
  float* scales = nullptr;              ///< [rows], written when dynamic; null: not written
  std::int32_t* zero_points = nullptr;  ///< [rows], likewise
  void* output = nullptr;               ///< [rows, cols] contiguous, input_dtype; null: not written
  const float* static_scale = nullptr;  ///< [1], finite, >= min_scale(float32); null: dynamic
  const std::int32_t* static_zero_point = nullptr;  ///< [1], with static_scale when asymmetric
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  ///< elements of input
  DType input_dtype = DType::kFloat32;
  QuantMode mode = QuantMode::kSymmetric;  ///< or kAsymmetric
};

/// The largest magnitudes of each row, what a dynamic grid of quantize_activation is made for:
/// several holders of parts of a row agree on its grid by the largest of theirs.
///
/// 0 for a row without columns; infinity where an infinity is the largest; a NaN makes one of them
/// a NaN. Ordered as GroupExtents are: a maximum over holders loses no NaN.
struct RowExtentsArgs {
  const float* input = nullptr;  ///< [rows, cols], rows contiguous
  /// Written; never a negative number or -0. Symmetric: [rows], absmax. Asymmetric: [2, rows], the
  /// largest magnitudes below and above 0.
  float* extents = nullptr;
  QuantMode mode = QuantMode::kSymmetric;  ///< or kAsymmetric
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  ///< elements of input
};

/// The numbers that codes stand for: output = scale * (code - zero_point) in float32, rounded once
/// to output_dtype. A NaN is the canonical quiet one, whatever that of the scale was.
struct DequantizeArgs {
  const void* codes = nullptr;   ///< [rows, cols] contiguous, int8 or int16
  const void* scales = nullptr;  ///< [num_groups], scale_dtype, row-major by (row, group)
  const std::int32_t* zero_points = nullptr;  ///< [num_groups]; null: all 0
  void* output = nullptr;                     ///< [rows, cols], strided, output_dtype
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  ///< elements of output
  std::int64_t col_stride = 0;  ///< elements of output
  std::int64_t group_size = 0;  ///< as FakeQuantizeTensor's
  DType codes_dtype = DType::kInt8;
  DType scale_dtype = DType::kFloat32;
  DType output_dtype = DType::kFloat32;
  Granularity granularity = Granularity::kPerChannel;
};

namespace cpu {
/// All pointers are host memory.
/// @throws moq::Error for a dtype or mode outside those named above, a zero point without a scale
/// or an asymmetric scale without one, or a given scale or zero point without a grid.
void quantize_activation(const QuantizeActivationArgs& args);

/// All pointers are host memory.
/// @throws moq::Error for a dtype outside those named above, or a group_size that does not divide
/// cols (kPerGroup) or rows (kPerRows).
void dequantize(const DequantizeArgs& args);

/// All pointers are host memory. Runs on up to num_threads() threads.
/// @throws moq::Error for a negative size.
void row_extents(const RowExtentsArgs& args);
}  // namespace cpu

namespace cuda {
/// All pointers are memory of the current device. The host cannot check a given scale or zero
/// point: without a grid they give codes 0 and outputs NaN.
/// @throws moq::Error as on the CPU but for those, and if a launch fails.
void quantize_activation(const QuantizeActivationArgs& args, CUstream_st* stream);

/// All pointers are memory of the current device.
/// @throws moq::Error as on the CPU, and if a launch fails.
void dequantize(const DequantizeArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
