#include "kernels/cuda/linear_wgmma_maps.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "kernels/common/check.h"
#include "kernels/cuda/cuda_check.h"

namespace moq::kernels::cuda {
namespace {

/// A function of the driver, asked for by name: nothing of ours is linked against the driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    constexpr unsigned kVersion = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    MOQ_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion,
                                                    cudaEnableDefault, &result));
    MOQ_CHECK(found != nullptr, "linear: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

struct Matrix {
  CUtensorMapDataType type;
  const void* data;
  std::int64_t cols;
  std::int64_t rows;
  std::int64_t row_bytes;
};

CUtensorMap encode(const Matrix& matrix, int box_cols, int box_rows, CUtensorMapSwizzle swizzle) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.cols),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_function()(&map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, strides, box,
                        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  MOQ_CHECK(result == CUDA_SUCCESS, "linear: cuTensorMapEncodeTiled failed with error ", result,
            " for ", matrix.rows, " rows of ", matrix.cols, " elements");
  return map;
}

}  // namespace

WgmmaMaps wgmma_maps(const DeviceLinearArgs& args, const DeviceLayout& layout,
                     const WgmmaBoxes& boxes) {
  constexpr std::int64_t kActivationBytes = 2;
  WgmmaMaps maps{};
  const bool bfloat16 = args.dtype == DType::kBFloat16;
  maps.tokens =
      encode({.type = bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
              .data = args.input,
              .cols = layout.k,
              .rows = args.m,
              .row_bytes = args.input_stride * kActivationBytes},
             kStepCols, boxes.tokens, CU_TENSOR_MAP_SWIZZLE_128B);
  // A box has at most 256 elements a row: the wider the elements, the more bytes.
  const std::int64_t row_bytes = layout.col_blocks * kBlockBytes;
  const std::int64_t unit = 4 * layout.element_bytes;
  const auto* packed = static_cast<const char*>(args.weight.data);
  maps.weight =
      encode({.type = unit == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT64,
              .data = packed,
              .cols = row_bytes / unit,
              .rows = layout.row_blocks,
              .row_bytes = row_bytes},
             256, boxes.row_blocks, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (layout.groups == 0) {
    return maps;
  }
  const Matrix grids{.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                     .data = packed + layout.scales_offset,
                     .cols = layout.groups * kBlockRows,
                     .rows = layout.row_blocks,
                     .row_bytes = layout.groups * kBlockRows * 4};
  const int box_cols = boxes.groups * kBlockRows;
  maps.scales = encode(grids, box_cols, boxes.row_blocks, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (layout.asymmetric) {
    Matrix zero_points = grids;
    zero_points.data = packed + layout.zero_points_offset;
    maps.zero_points = encode(zero_points, box_cols, boxes.row_blocks, CU_TENSOR_MAP_SWIZZLE_NONE);
  }
  return maps;
}

}  // namespace moq::kernels::cuda
