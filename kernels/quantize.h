#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/fake_quantize.h"
#include "kernels/quant_grid.h"

struct CUstream_st;

namespace moq::kernels {

/// Quantizes activations to symmetric INT8, the grid of the INT8 x INT8 matrix products:
///
///   codes  = clamp(rint(input * (1 / scale)), -127, 127),   output = codes * scale
///
/// Dynamic (static_scale is null): one scale per row (token), float32, absmax / 127 as
/// quant_grid.h defines it; a row of zeros has the smallest scale and codes 0; a row that holds a
/// NaN or an infinity has scale NaN, codes 0 and output NaN. Static: one given scale, and a NaN
/// element has code 0 and output NaN; a given scale that is not finite or below min_scale(float32)
/// has no grid. The output never holds a negative zero.
struct QuantizeActivationArgs {
  const void* input = nullptr;          ///< [rows, cols], rows contiguous, input_dtype
  std::int8_t* codes = nullptr;         ///< [rows, cols] contiguous; null: not written
  float* scales = nullptr;              ///< [rows], written when dynamic; null: not written
  void* output = nullptr;               ///< [rows, cols] contiguous, input_dtype; null: not written
  const float* static_scale = nullptr;  ///< [1], finite, >= min_scale(float32); null: dynamic
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;  ///< elements of input
  DType input_dtype = DType::kFloat32;
};

/// The largest magnitude of each row, what a dynamic grid of quantize_activation is made for:
/// several holders of parts of a row agree on its grid by the largest of theirs.
///
/// 0 for a row without columns; infinity for one that holds an infinity; NaN for one that holds a
/// NaN. Compared as int32 bit patterns the results are ordered as those magnitudes are, NaN last: a
/// maximum of them taken so loses no NaN.
struct RowAbsmaxArgs {
  const float* input = nullptr;  ///< [rows, cols], rows contiguous
  float* absmax = nullptr;       ///< [rows], written; never a negative number or -0
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
/// @throws moq::Error for a dtype outside those named above, or a given scale without a grid.
void quantize_activation(const QuantizeActivationArgs& args);

/// All pointers are host memory.
/// @throws moq::Error for a dtype outside those named above, or a group_size that does not divide
/// cols (kPerGroup) or rows (kPerRows).
void dequantize(const DequantizeArgs& args);

/// All pointers are host memory. Runs on up to num_threads() threads.
/// @throws moq::Error for a negative size.
void row_absmax(const RowAbsmaxArgs& args);
}  // namespace cpu

namespace cuda {
/// All pointers are memory of the current device. The host cannot check a given scale: one without
/// a grid gives codes 0 and outputs NaN.
/// @throws moq::Error for a dtype outside those named above, and if a launch fails.
void quantize_activation(const QuantizeActivationArgs& args, CUstream_st* stream);

/// All pointers are memory of the current device.
/// @throws moq::Error as on the CPU, and if a launch fails.
void dequantize(const DequantizeArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
