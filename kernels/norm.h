#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/input_rounding.h"

struct CUstream_st;

namespace moq::kernels {

enum class NormKind : std::uint8_t { kNone, kLayerNorm, kRmsNorm };

/// Layer normalisation of each row, with the addition of the residual stream fused in front:
///
///   x      = input + residual
///   output = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias
///
/// float32 throughout; mean first, then the (biased) variance of the differences, each summed in an
/// order that depends on hidden_size alone: a row's result does not depend on its neighbours.
/// A null sum is not written.
struct LayerNormArgs {
  const float* input;               ///< [num_tokens, hidden_size], row-major
  const float* residual = nullptr;  ///< [num_tokens, hidden_size]; null: nothing is added
  float* sum = nullptr;         ///< [num_tokens, hidden_size], receives x; may be input or residual
  const float* weight;          ///< [hidden_size]
  const float* bias = nullptr;  ///< [hidden_size]; null: 0
  float* output;                ///< [num_tokens, hidden_size]; may be input or residual, not sum
  std::int64_t num_tokens;      ///< >= 0
  std::int64_t hidden_size;     ///< >= 1
  float epsilon;
};

/// Root-mean-square normalisation, as layer_norm without mean and bias:
///
///   x      = input + residual
///   output = x / sqrt(mean(x^2) + epsilon) * weight
///
/// A null sum is not written.
struct RmsNormArgs {
  const float* input;               ///< [num_tokens, hidden_size], row-major
  const float* residual = nullptr;  ///< [num_tokens, hidden_size]; null: nothing is added
  float* sum = nullptr;      ///< [num_tokens, hidden_size], receives x; may be input or residual
  const float* weight;       ///< [hidden_size]
  float* output;             ///< [num_tokens, hidden_size]; may be input or residual, not sum
  std::int64_t num_tokens;   ///< >= 0
  std::int64_t hidden_size;  ///< >= 1
  float epsilon;
};

namespace cpu {
/// @throws moq::Error if a size is out of range, or sum is output.
void layer_norm(const LayerNormArgs& args);
/// @throws moq::Error if a size is out of range, or sum is output.
void rms_norm(const RmsNormArgs& args);
}  // namespace cpu

/// A normalisation on a GPU, as `layer_norm` and `rms_norm` define them. Pointers are device
/// memory.
struct DeviceNorm {
  NormKind kind = NormKind::kNone;  ///< kNone: the rows as they are
  const float* weight = nullptr;    ///< [hidden_size]
  const float* bias = nullptr;      ///< [hidden_size], or null: 0; kLayerNorm only
  float epsilon = 0.0F;
};

/// output[t] = norm(input[rows[t]]). Statistics in float32, mean first, then the variance of the
/// differences; the result is rounded to dtype once, or with float32_output written as it is.
/// Pointers are device memory. A row's bits do not depend on its neighbours, but sums are in one
/// order up to a few hundred rows, in another above.
///
/// With a `rounding` the result is rounded once more, to an 8-bit grid: `output` receives the
/// codes, less the zero point of an asymmetric grid, as numbers of dtype (exact: magnitudes up to
/// 255), and row_scales the step sizes. That is the input of an INT8 linear layer with
/// DeviceLinearArgs::row_scales. On a static grid numbers beyond its ends are limited to them, and
/// a NaN stays one, which makes all of the row's products one.
struct DeviceNormArgs {
  const void* input = nullptr;         ///< [rows, hidden_size], dtype, rows input_stride apart
  std::int64_t input_stride = 0;       ///< elements
  const std::int32_t* rows = nullptr;  ///< [num_tokens]: rows of input; null: 0, 1, 2, …
  DeviceNorm norm = {};
  bool weight_is_ready = false;    ///< norm's weight and bias: no kernel ahead in the stream writes
  void* output = nullptr;          ///< [num_tokens, hidden_size], dtype; may be input without rows
  bool float32_output = false;     ///< not with a rounding, nor in place of other dtypes
  std::int64_t output_stride = 0;  ///< elements
  InputRounding rounding = {};     ///< kFloat32: none
  float* row_scales = nullptr;     ///< [num_tokens], written; with a rounding, and only then
  /// What each row's dynamic grid is made for, where the rows are parts of longer ones
  /// (row-parallel layers), as row_extents has it; null: the row's own.
  const float* given_extents = nullptr;
  /// Receives what the dynamic grid of each result would be made for, and nothing else is written:
  /// neither output nor row_scales is given. Symmetric: [num_tokens], absmax. Asymmetric:
  /// [2, num_tokens], the largest magnitudes below and above 0. Signs are never set, and a NaN
  /// makes one of them a NaN: as GroupExtents are.
  float* row_extents = nullptr;
  std::int64_t num_tokens = 0;    ///< in [0, 2^31)
  std::int64_t hidden_size = 0;   ///< in [1, 2^30]
  DType dtype = DType::kFloat16;  ///< float16, bfloat16 or float32
};

namespace cuda {
/// @throws moq::Error if a size or the dtype is out of range, a pointer is missing, or the launch
///         fails.
void norm(const DeviceNormArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
