#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/philox.h"
#include "kernels/cuda/fake_quantize_tiles.h"
#include "kernels/fake_quantize.h"

/// The usual matrices, by whole vectors.
namespace moq::kernels::cuda {

constexpr std::int64_t kLoadBytes = 16;  // at once, of input; as many are stored at most

/// Columns of which a matrix must be made up, to be usual: whole vectors of 16 bytes, and whole
/// blocks of draws.
inline std::int64_t vector_columns(const FakeQuantizeTensor& matrix) {
  const bool by_columns = matrix.col_stride == 1;
  return by_columns && matrix.rounding == Rounding::kNearest &&
                 matrix.input_dtype == DType::kFloat32
             ? kQuad
             : kPhiloxHalves;
}

/// Whether a matrix is usual: simulated values alone are wanted, on grids of the extent whose codes
/// are rounded, and everything is whole, aligned vectors.
inline bool takes_vectors(const FakeQuantizeTensor& matrix) {
  const bool by_columns = matrix.col_stride == 1;
  const bool by_rows = matrix.row_stride == 1 && matrix.granularity == Granularity::kPerChannel;
  const std::int64_t stride = by_columns ? matrix.row_stride : matrix.col_stride;
  const std::int64_t columns = vector_columns(matrix);
  // Elements that are loaded, and stored, at once.
  const std::int64_t width =
      by_columns ? kLoadBytes / static_cast<std::int64_t>(size_of(matrix.input_dtype)) : kQuad;
  const auto is_aligned = [&](const void* data, DType dtype) {
    const auto bytes = static_cast<std::uintptr_t>(width) * size_of(dtype);
    return reinterpret_cast<std::uintptr_t>(data) % std::min<std::uintptr_t>(bytes, kLoadBytes) ==
           0;
  };
  const bool rounds = matrix.mode == QuantMode::kSymmetric || matrix.mode == QuantMode::kAsymmetric;
  const std::int64_t pitch = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  const std::int64_t last = matrix.first_element + matrix.rows * pitch;
  const bool draws_whole_blocks =
      matrix.rounding == Rounding::kNearest ||
      (matrix.first_element % kPhiloxHalves == 0 && pitch % kPhiloxHalves == 0 &&
       (last / kPhiloxHalves) >> 32 == (matrix.first_element / kPhiloxHalves) >> 32);
  return matrix.output != nullptr && matrix.codes == nullptr && rounds &&
         matrix.scale_rule == ScaleRule::kExtent && !rows_share_scales(matrix) &&
         (by_columns || (by_rows && matrix.rows % kQuad == 0)) && matrix.cols % columns == 0 &&
         columns_per_group(matrix) % columns == 0 && stride % width == 0 &&
         is_aligned(matrix.input, matrix.input_dtype) &&
         is_aligned(matrix.output, matrix.output_dtype) && draws_whole_blocks;
}

/// fake_quantize of those matrices of a checked call that take vectors: a launch for each
/// combination of dtypes, rounding and storage.
void fake_quantize_vectors(const FakeQuantizeArgs& args, int multiprocessors, CUstream_st* stream);

}  // namespace moq::kernels::cuda
