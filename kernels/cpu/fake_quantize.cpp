// Cuts a multi-tensor fake-quantize into ranges of rows that threads share evenly, and hands each
// to the active instruction set in one of its two storages; any other storage is staged through a
// copy.
#include "kernels/fake_quantize.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/parallel.h"
#include "kernels/common/visit.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/fake_quantize.h"

namespace moq::kernels::cpu {
namespace {

/// Elements of one unit of work: long enough that handing it out costs nothing, short enough that
/// threads finish together.
constexpr std::int64_t kUnitElements = 64 * 1024;

/// Rows of a unit when columns are contiguous, so that memory is still read in long pieces.
constexpr std::int64_t kUnitLanes = 256;

/// Outputs of at least this many bytes in one call are stored past the caches: they would push out
/// of them what comes next, and a streaming store does not first read the line it overwrites.
constexpr std::int64_t kStreamBytes = 8 * 1024 * 1024;

bool rows_are_contiguous(const FakeQuantizeTensor& matrix) {
  return matrix.col_stride == 1 || matrix.cols == 1;
}

bool columns_are_contiguous(const FakeQuantizeTensor& matrix) {
  return matrix.row_stride == 1 || matrix.rows == 1;
}

/// Neither: the instruction sets get a contiguous copy.
bool is_staged(const FakeQuantizeTensor& matrix) {
  return !rows_are_contiguous(matrix) && !columns_are_contiguous(matrix);
}

/// A range of one matrix's rows.
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
FakeQuantizeTensor rows_of(FakeQuantizeTensor matrix, std::int64_t begin, std::int64_t end) {
  const std::int64_t first_group = begin * groups_per_row(matrix);
  advance(matrix.input, begin * matrix.row_stride, matrix.input_dtype);
  advance(matrix.output, begin * matrix.row_stride, matrix.output_dtype);
  advance(matrix.codes, begin * matrix.cols, matrix.codes_dtype);
  advance(matrix.scales, first_group, matrix.scale_dtype);
  advance(matrix.zero_points, first_group);
  matrix.unsharded_cols = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  matrix.first_element += begin * matrix.unsharded_cols;
  matrix.rows = end - begin;
  return matrix;
}

std::vector<Unit> units_of(std::span<const FakeQuantizeTensor> tensors) {
  std::vector<Unit> units;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const FakeQuantizeTensor& matrix = tensors[i];
    std::int64_t rows = kUnitElements / std::max<std::int64_t>(matrix.cols, 1);
    rows = std::max<std::int64_t>(rows, 1);
    if (!rows_are_contiguous(matrix) && columns_are_contiguous(matrix)) {
      rows = std::max(kUnitLanes, rows / kUnitLanes * kUnitLanes);
    }
    for (std::int64_t begin = 0; begin < matrix.rows; begin += rows) {
      units.push_back({i, begin, std::min(begin + rows, matrix.rows)});
    }
  }
  return units;
}

/// Copies a matrix of `element_size`-byte elements from one pair of strides to another.
void copy_strided(const std::byte* input, std::int64_t input_row_stride,
                  std::int64_t input_col_stride, std::byte* output, std::int64_t output_row_stride,
                  std::int64_t output_col_stride, std::int64_t rows, std::int64_t cols,
                  std::int64_t element_size) {
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

bool has_one_scale(const FakeQuantizeArgs& args, std::size_t tensor) {
  return args.tensors[tensor].granularity == Granularity::kPerTensor && args.num_bits[tensor] != 0;
}

/// The same elements with the names of rows and columns exchanged: for work that treats all alike.
FakeQuantizeTensor transposed(FakeQuantizeTensor matrix) {
  std::swap(matrix.rows, matrix.cols);
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

GroupStatistics statistics_of_unit(FakeQuantizeTensor matrix) {
  matrix.output = nullptr;  // or staging would write it, and it may be the input
  GroupStatistics statistics;
  const auto collect = [&](const FakeQuantizeTensor& rows) {
    statistics = MOQ_DISPATCH_ISA(matrix_statistics, rows);
  };
  if (rows_are_contiguous(matrix)) {
    collect(matrix);
  } else if (columns_are_contiguous(matrix)) {
    collect(transposed(matrix));
  } else {
    staged(matrix, collect);
  }
  return statistics;
}

void copy_unit(const FakeQuantizeTensor& matrix, bool stream) {
  if (matrix.output == nullptr ||
      (matrix.output == matrix.input && matrix.output_dtype == matrix.input_dtype)) {
    return;
  }
  const auto copy = [&](const FakeQuantizeTensor& rows) {
    MOQ_DISPATCH_ISA(copy_rows, rows, stream);
  };
  if (rows_are_contiguous(matrix)) {
    copy(matrix);
  } else if (columns_are_contiguous(matrix)) {
    copy(transposed(matrix));
  } else {
    staged(matrix, copy);
  }
}

void fake_quantize_unit(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step) {
  if (rows_are_contiguous(matrix)) {
    MOQ_DISPATCH_ISA(fake_quantize_rows, matrix, step);
  } else if (columns_are_contiguous(matrix)) {
    MOQ_DISPATCH_ISA(fake_quantize_columns, matrix, step);
  } else {
    staged(matrix, [&](const FakeQuantizeTensor& contiguous) {
      MOQ_DISPATCH_ISA(fake_quantize_rows, contiguous, step);
    });
  }
}

/// Statistics of each matrix that has one scale; the others' stay empty.
std::vector<GroupStatistics> tensor_statistics(const FakeQuantizeArgs& args,
                                               std::span<const Unit> units) {
  std::vector<GroupStatistics> parts(units.size());
  parallel_for(
      static_cast<std::int64_t>(units.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const Unit& unit = units[i];
          if (has_one_scale(args, unit.tensor)) {
            parts[i] = statistics_of_unit(rows_of(args.tensors[unit.tensor], unit.begin, unit.end));
          }
        }
      });
  std::vector<GroupStatistics> all(args.tensors.size());
  for (std::size_t i = 0; i < units.size(); ++i) {
    GroupStatistics& tensor = all[units[i].tensor];
    tensor.lowest = std::min(tensor.lowest, parts[i].lowest);
    tensor.highest = std::max(tensor.highest, parts[i].highest);
  }
  return all;
}

/// Writes the one scale and zero point of a matrix.
void store_tensor_parameters(const FakeQuantizeTensor& matrix, const GroupStatistics& statistics,
                             int num_bits) {
  const GridParams grid = make_grid(statistics, num_bits, matrix.mode, matrix.scale_dtype);
  if (matrix.scales != nullptr) {
    visit_float(matrix.scale_dtype, [&]<typename Scale>(Scale) {
      store_float(static_cast<Scale*>(matrix.scales), grid.scale);
    });
  }
  if (matrix.zero_points != nullptr) {
    *matrix.zero_points = grid.zero_point;
  }
}

bool streams(std::span<const FakeQuantizeTensor> tensors) {
  std::int64_t bytes = 0;
  for (const FakeQuantizeTensor& matrix : tensors) {
    if (matrix.output != nullptr) {
      bytes += matrix.rows * matrix.cols * static_cast<std::int64_t>(size_of(matrix.output_dtype));
    }
  }
  return bytes >= kStreamBytes;
}

void check(const FakeQuantizeTensor& matrix, int num_bits, float blend_ratio, std::size_t i) {
  check_fake_quantize_tensor(matrix, i);
  MOQ_CHECK(num_bits == 0 || (num_bits >= kMinBits && num_bits <= kMaxBits),
            "fake_quantize: num_bits of tensor ", i, " must be 0 or in [", kMinBits, ", ", kMaxBits,
            "], got ", num_bits);
  MOQ_CHECK(matrix.codes == nullptr || matrix.codes_dtype == DType::kInt16 || num_bits <= 8,
            "fake_quantize: int8 codes of tensor ", i, " need num_bits <= 8, got ", num_bits);
  MOQ_CHECK(blend_ratio >= 0.0F && blend_ratio <= 1.0F, "fake_quantize: blend_ratio of tensor ", i,
            " must be in [0, 1], got ", blend_ratio);
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args) {
  const auto blend_ratio = [&](std::size_t i) {
    return args.blend_ratio != nullptr ? args.blend_ratio[i] : 0.0F;
  };
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    check(args.tensors[i], args.num_bits[i], blend_ratio(i), i);
  }
  if (args.skip != nullptr && *args.skip != 0.0F) {
    return;
  }
  const std::vector<Unit> units = units_of(args.tensors);
  std::vector<GroupStatistics> statistics;
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    if (has_one_scale(args, i)) {
      if (statistics.empty()) {
        statistics = tensor_statistics(args, units);
      }
      store_tensor_parameters(args.tensors[i], statistics[i], args.num_bits[i]);
    }
  }
  const bool stream = streams(args.tensors);
  const auto step = static_cast<std::uint32_t>(args.step != nullptr ? *args.step : 0);
  parallel_for(
      static_cast<std::int64_t>(units.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const auto [tensor, first_row, end_row] = units[i];
          const FakeQuantizeTensor matrix = rows_of(args.tensors[tensor], first_row, end_row);
          // What is read again at once stays in the caches: an input, a staged copy.
          const bool past_caches = stream && matrix.output != matrix.input && !is_staged(matrix);
          if (args.num_bits[tensor] == 0) {
            copy_unit(matrix, past_caches);
            continue;
          }
          fake_quantize_unit(
              matrix,
              {.num_bits = args.num_bits[tensor],
               .blend_ratio = blend_ratio(tensor),
               .seed = args.seed,
               .step = step,
               .stream = past_caches,
               .tensor_statistics = has_one_scale(args, tensor) ? &statistics[tensor] : nullptr});
        }
      });
}

}  // namespace moq::kernels::cpu
