#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/cuda/fake_quantize_tiles.h"
#include "kernels/fake_quantize.h"

/// The usual matrices, by whole vectors.
namespace moq::kernels::cuda {

/// Whether a matrix is usual: simulated values alone are wanted, on grids of the extent whose codes
/// are rounded, and everything is whole, aligned vectors.
inline bool takes_vectors(const FakeQuantizeTensor& matrix) {
  const bool by_columns = matrix.col_stride == 1;
  const std::int64_t stride = by_columns ? matrix.row_stride : matrix.col_stride;
  const auto is_aligned = [](const void* data, DType dtype) {
    return reinterpret_cast<std::uintptr_t>(data) % (kQuad * size_of(dtype)) == 0;
  };
  const bool rounds = matrix.mode == QuantMode::kSymmetric || matrix.mode == QuantMode::kAsymmetric;
  const bool draws_whole_blocks =
      matrix.rounding == Rounding::kNearest ||
      (matrix.first_element % kQuad == 0 && matrix.unsharded_cols % kQuad == 0);
  return matrix.output != nullptr && matrix.codes == nullptr && rounds &&
         matrix.scale_rule == ScaleRule::kExtent && !rows_share_scales(matrix) &&
         (by_columns || (matrix.row_stride == 1 && matrix.rows % kQuad == 0 &&
                         matrix.granularity == Granularity::kPerChannel)) &&
         matrix.cols % kQuad == 0 && columns_per_group(matrix) % kQuad == 0 &&
         stride % kQuad == 0 && is_aligned(matrix.input, matrix.input_dtype) &&
         is_aligned(matrix.output, matrix.output_dtype) && draws_whole_blocks;
}

/// fake_quantize of those matrices of a checked call that take vectors: a launch for each
/// combination of dtypes, rounding and storage.
void fake_quantize_vectors(const FakeQuantizeArgs& args, int multiprocessors, CUstream_st* stream);

}  // namespace moq::kernels::cuda
