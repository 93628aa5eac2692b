#pragma once

#include <bit>
#include <cstdint>

#include "kernels/cuda/fake_quantize_vectors.h"

/// Usual matrices in small groups, such as 64 or 128 columns.
namespace moq::kernels::cuda {

/// Lanes of a warp that hold a group together, by a vector each.
inline std::int64_t lanes_per_group(const FakeQuantizeTensor& matrix) {
  return columns_per_group(matrix) * static_cast<std::int64_t>(size_of(matrix.input_dtype)) /
         kLoadBytes;
}

/// Whether a matrix that takes vectors is one array of groups, each of which whole lanes of one
/// warp can hold.
inline bool takes_groups(const FakeQuantizeTensor& matrix) {
  const std::int64_t lanes = lanes_per_group(matrix);
  return takes_vectors(matrix) && matrix.col_stride == 1 && matrix.row_stride == matrix.cols &&
         (matrix.unsharded_cols == 0 || matrix.unsharded_cols == matrix.cols) &&
         matrix.cols % columns_per_group(matrix) == 0 && lanes <= kWarpSize &&
         std::has_single_bit(static_cast<std::uint64_t>(lanes));
}

/// fake_quantize of those matrices of a checked call that take groups: a launch for each
/// combination of dtypes and rounding.
void fake_quantize_groups(const FakeQuantizeArgs& args, int multiprocessors, CUstream_st* stream);

}  // namespace moq::kernels::cuda
