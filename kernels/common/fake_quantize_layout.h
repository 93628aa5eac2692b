#pragma once

#include "kernels/common/host_device.h"
#include "kernels/fake_quantize.h"

/// How a fake-quantized matrix lies in memory, and how its groups are counted.
namespace moq::kernels {

inline bool rows_are_contiguous(const FakeQuantizeTensor& matrix) {
  return matrix.col_stride == 1 || matrix.cols <= 1;
}

inline bool columns_are_contiguous(const FakeQuantizeTensor& matrix) {
  return matrix.row_stride == 1 || matrix.rows <= 1;
}

/// Columns that share a scale, in any granularity.
MOQ_HOST_DEVICE inline std::int64_t columns_per_group(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerGroup ? matrix.group_size : matrix.cols;
}

/// Groups that begin in a row; a group of several rows counts for each of them.
MOQ_HOST_DEVICE inline std::int64_t groups_per_row(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerGroup ? matrix.cols / matrix.group_size : 1;
}

/// True if rows share their scales.
MOQ_HOST_DEVICE inline bool rows_share_scales(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerTensor ||
         matrix.granularity == Granularity::kPerRows;
}

/// Rows that share a scale.
MOQ_HOST_DEVICE inline std::int64_t rows_per_group(const FakeQuantizeTensor& matrix) {
  switch (matrix.granularity) {
    case Granularity::kPerTensor:
      return matrix.rows > 0 ? matrix.rows : 1;
    case Granularity::kPerRows:
      return matrix.group_size;
    default:
      return 1;
  }
}

/// Scales of the whole matrix.
MOQ_HOST_DEVICE inline std::int64_t num_groups(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerTensor
             ? 1
             : matrix.rows / rows_per_group(matrix) * groups_per_row(matrix);
}

/// Statistics of a group whose absmax is given.
MOQ_HOST_DEVICE inline GroupStatistics given_statistics(const FakeQuantizeTensor& matrix,
                                                        std::int64_t group) {
  return {0, std::bit_cast<std::int32_t>(matrix.given_absmax[group]) & kMagnitudeMask};
}

}  // namespace moq::kernels
