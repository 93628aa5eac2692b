#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <numeric>
#include <span>

/// The argument rules of inference/parallel/communicator.h, in one place for every transport.
namespace moq::inference::detail {

inline void check_contiguous(const char* where, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), where,
                    ": the tensor must be contiguous and on the CPU, got one on ", tensor.device(),
                    " with strides ", tensor.strides());
}

inline void check_float32(const char* where, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, where, ": the tensor must be float32, got ",
                   c10::getDtypeNames(tensor.scalar_type()).first);
  check_contiguous(where, tensor);
}

inline void check_root(int root, int size) {
  TORCH_CHECK_VALUE(root >= 0 && root < size, "broadcast: root must be in [0, ", size, "), got ",
                    root);
}

/// @returns the number of columns of all shards together
inline std::int64_t check_columns(const at::Tensor& shard, std::span<const std::int64_t> widths,
                                  int rank, int size) {
  check_float32("all_gather_columns", shard);
  TORCH_CHECK_VALUE(widths.size() == static_cast<std::size_t>(size),
                    "all_gather_columns: widths must have one number per rank (", size, "), got ",
                    widths.size());
  for (const std::int64_t width : widths) {
    TORCH_CHECK_VALUE(width >= 0, "all_gather_columns: widths must be >= 0, got ", width);
  }
  const std::int64_t own_width = widths[static_cast<std::size_t>(rank)];
  TORCH_CHECK_VALUE(shard.dim() == 2 && shard.size(1) == own_width,
                    "all_gather_columns: the shard of rank ", rank, " must be [m, ", own_width,
                    "], got ", shard.sizes());
  return std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
}

/// Makes `result` a [rows, columns] float32 tensor, in the memory that it has if that is enough.
inline void shape_result(at::Tensor& result, std::int64_t rows, std::int64_t columns) {
  if (result.defined()) {
    check_float32("all_gather_columns", result);
    result.resize_({rows, columns});
  } else {
    result = at::empty({rows, columns}, at::kFloat);
  }
}

inline std::span<float> floats_of(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

inline std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes()};
}

}  // namespace moq::inference::detail
