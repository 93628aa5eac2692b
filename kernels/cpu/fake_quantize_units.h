#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/common/dtype.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/fake_quantize.h"
#include "kernels/fake_quantize.h"

/// How the CPU cuts matrices into ranges of rows, and brings those into a storage that the
/// instruction sets have a loop for.
namespace moq::kernels::cpu {

/// Elements of one unit of work: long enough that handing it out costs nothing, short enough that
/// threads finish together.
inline constexpr std::int64_t kUnitElements = 64 * 1024;

/// Outputs of at least this many bytes in one call are stored past the caches: they would push out
/// of them what comes next, and a streaming store does not first read the line it overwrites.
inline constexpr std::int64_t kStreamBytes = 8 * 1024 * 1024;

/// Rows of a unit when columns are contiguous, so that memory is still read in long pieces.
inline constexpr std::int64_t kUnitLanes = 256;

/// Neither: the instruction sets get a contiguous copy.
inline bool is_staged(const FakeQuantizeTensor& matrix) {
  return !rows_are_contiguous(matrix) && !columns_are_contiguous(matrix);
}

/// A range of one matrix's rows; rows that share a scale with others share it with all of these.
struct Unit {
  std::size_t tensor;
  std::int64_t begin;
  std::int64_t end;
};

template <typename Element>
void advance(Element*& pointer, std::int64_t elements) {
  if (pointer != nullptr) {
    pointer += elements;
  }
}

template <typename Void>
void advance(Void*& pointer, std::int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  if (pointer != nullptr) {
    pointer = static_cast<Byte*>(pointer) + elements * static_cast<std::int64_t>(size_of(dtype));
  }
}

/// The rows [begin, end) of a matrix, as a matrix.
inline FakeQuantizeTensor rows_of(FakeQuantizeTensor matrix, std::int64_t begin, std::int64_t end) {
  // Scales that rows share are stored elsewhere.
  const std::int64_t first_group = rows_share_scales(matrix) ? 0 : begin * groups_per_row(matrix);
  advance(matrix.input, begin * matrix.row_stride, matrix.input_dtype);
  advance(matrix.output, begin * matrix.row_stride, matrix.output_dtype);
  advance(matrix.codes, begin * matrix.cols, matrix.codes_dtype);
  advance(matrix.scales, first_group, matrix.scale_dtype);
  advance(matrix.zero_points, first_group);
  advance(matrix.given_absmax, first_group);
  matrix.unsharded_cols = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  matrix.first_element += begin * matrix.unsharded_cols;
  matrix.rows = end - begin;
  return matrix;
}

inline std::vector<Unit> units_of(std::span<const FakeQuantizeTensor> tensors) {
  std::vector<Unit> units;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const FakeQuantizeTensor& matrix = tensors[i];
    std::int64_t rows = kUnitElements / std::max<std::int64_t>(matrix.cols, 1);
    rows = std::max<std::int64_t>(rows, 1);
    if (!rows_are_contiguous(matrix) && columns_are_contiguous(matrix)) {
      rows = std::max(kUnitLanes, rows / kUnitLanes * kUnitLanes);
    }
    const std::int64_t share = rows_share_scales(matrix) ? rows_per_group(matrix) : matrix.rows;
    for (std::int64_t begin = 0; begin < matrix.rows;) {
      const std::int64_t share_end = (begin / share + 1) * share;
      const std::int64_t end = std::min({begin + rows, matrix.rows, share_end});
      units.push_back({i, begin, end});
      begin = end;
    }
  }
  return units;
}

/// Copies a matrix of `element_size`-byte elements from one pair of strides to another.
inline void copy_strided(const std::byte* input, std::int64_t input_row_stride,
                         std::int64_t input_col_stride, std::byte* output,
                         std::int64_t output_row_stride, std::int64_t output_col_stride,
                         std::int64_t rows, std::int64_t cols, std::int64_t element_size) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      std::memcpy(output + (row * output_row_stride + col * output_col_stride) * element_size,
                  input + (row * input_row_stride + col * input_col_stride) * element_size,
                  static_cast<std::size_t>(element_size));
    }
  }
}

/// Calls body(matrix with contiguous rows) for a matrix whose rows and columns are both scattered.
template <typename Body>
void staged(const FakeQuantizeTensor& matrix, const Body& body) {
  const auto input_size = static_cast<std::int64_t>(size_of(matrix.input_dtype));
  const auto output_size = static_cast<std::int64_t>(size_of(matrix.output_dtype));
  std::vector<std::byte> input(static_cast<std::size_t>(matrix.rows * matrix.cols * input_size));
  std::vector<std::byte> output(
      matrix.output != nullptr ? static_cast<std::size_t>(matrix.rows * matrix.cols * output_size)
                               : 0);
  copy_strided(static_cast<const std::byte*>(matrix.input), matrix.row_stride, matrix.col_stride,
               input.data(), matrix.cols, 1, matrix.rows, matrix.cols, input_size);
  FakeQuantizeTensor contiguous = matrix;
  contiguous.input = input.data();
  contiguous.output = matrix.output != nullptr ? output.data() : nullptr;
  contiguous.row_stride = matrix.cols;
  contiguous.col_stride = 1;
  body(contiguous);
  if (matrix.output != nullptr) {
    copy_strided(output.data(), matrix.cols, 1, static_cast<std::byte*>(matrix.output),
                 matrix.row_stride, matrix.col_stride, matrix.rows, matrix.cols, output_size);
  }
}

/// The same elements with the names of rows and columns exchanged: for work that treats all alike.
inline FakeQuantizeTensor transposed(FakeQuantizeTensor matrix) {
  std::swap(matrix.rows, matrix.cols);
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

/// Calls body(matrix with contiguous rows) for work that treats all elements alike.
template <typename Body>
void in_any_order(const FakeQuantizeTensor& matrix, const Body& body) {
  if (rows_are_contiguous(matrix)) {
    body(matrix);
  } else if (columns_are_contiguous(matrix)) {
    body(transposed(matrix));
  } else {
    staged(matrix, body);
  }
}

/// output = input, converted; nothing without an output, or where that is the input.
inline void copy_unit(const FakeQuantizeTensor& matrix, bool stream) {
  if (matrix.output == nullptr ||
      (matrix.output == matrix.input && matrix.output_dtype == matrix.input_dtype)) {
    return;
  }
  in_any_order(matrix,
               [&](const FakeQuantizeTensor& rows) { MOQ_DISPATCH_ISA(copy_rows, rows, stream); });
}

}  // namespace moq::kernels::cpu
