#pragma once

#include "kernels/common/host_device.h"
#include "kernels/fake_quantize.h"

/// How the groups of a fake-quantized matrix are counted.
namespace moq::kernels {

/// Columns that share a scale, in any granularity.
MOQ_HOST_DEVICE inline std::int64_t columns_per_group(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerGroup ? matrix.group_size : matrix.cols;
}

/// Groups that begin in a row; with one scale per tensor, its one group counts for every row.
MOQ_HOST_DEVICE inline std::int64_t groups_per_row(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerGroup ? matrix.cols / matrix.group_size : 1;
}

/// Scales of the whole matrix.
MOQ_HOST_DEVICE inline std::int64_t num_groups(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerTensor ? 1 : matrix.rows * groups_per_row(matrix);
}

}  // namespace moq::kernels
