#pragma once

#include <cstddef>
#include <ostream>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/visit.h"
#include "kernels/fake_quantize.h"

/// What the CPU and the CUDA bodies that take such a matrix share before they differ.
namespace moq::kernels {

/// Tensor `number` of a call, as messages call it.
struct NthTensor {
  std::size_t number;
  friend std::ostream& operator<<(std::ostream& stream, const NthTensor& tensor) {
    return stream << "tensor " << tensor.number;
  }
};

/// Checks one matrix, which messages of `where` call `of`.
/// @throws moq::Error as documented in kernels/fake_quantize.h, for all that the host can see.
template <typename Name>
void check_matrix(const FakeQuantizeTensor& matrix, const char* where, const Name& of) {
  MOQ_CHECK(matrix.rows >= 0 && matrix.cols >= 0, where, ": shape of ", of, " must be >= 0, got ",
            matrix.rows, " x ", matrix.cols);
  MOQ_CHECK(matrix.input != nullptr || matrix.rows == 0 || matrix.cols == 0, where, ": input of ",
            of, " must not be null");
  MOQ_CHECK(
      is_float(matrix.input_dtype) && is_float(matrix.output_dtype) && is_float(matrix.scale_dtype),
      where, ": input, output and scale of ", of, " must be float32, float16 or bfloat16, got ",
      name_of(matrix.input_dtype), ", ", name_of(matrix.output_dtype), " and ",
      name_of(matrix.scale_dtype));
  MOQ_CHECK(matrix.codes_dtype == DType::kInt8 || matrix.codes_dtype == DType::kInt16, where,
            ": codes of ", of, " must be int8 or int16, got ", name_of(matrix.codes_dtype));
  MOQ_CHECK(matrix.granularity != Granularity::kPerGroup ||
                (matrix.group_size > 0 && matrix.cols % matrix.group_size == 0),
            where, ": group_size of ", of, " must divide its columns, got ", matrix.group_size,
            " and ", matrix.cols);
  MOQ_CHECK(matrix.granularity != Granularity::kPerRows ||
                (matrix.group_size > 0 && matrix.rows % matrix.group_size == 0),
            where, ": group_size of ", of, " must divide its rows, got ", matrix.group_size,
            " and ", matrix.rows);
  MOQ_CHECK(matrix.rounding == Rounding::kNearest || matrix.mode == QuantMode::kSymmetric ||
                matrix.mode == QuantMode::kAsymmetric,
            where, ": ternary and binary codes of ", of,
            " are signs: rounding must be nearest, got stochastic");
  MOQ_CHECK(matrix.collected == nullptr || rows_share_scales(matrix), where,
            ": collected groups of ", of, " must be those of a matrix whose rows share scales");
  MOQ_CHECK(matrix.scale_rule != ScaleRule::kGiven || matrix.given_absmax != nullptr ||
                num_groups(matrix) == 0,
            where, ": given_absmax of ", of, " must not be null");
  MOQ_CHECK(matrix.scale_rule != ScaleRule::kGiven || matrix.mode == QuantMode::kSymmetric, where,
            ": given scales of ", of, " are those of a symmetric grid, got another");
  MOQ_CHECK(matrix.output != matrix.input || matrix.output_dtype == matrix.input_dtype ||
                matrix.output == nullptr,
            where, ": ", of, " can only be its own output in its own dtype, got ",
            name_of(matrix.input_dtype), " and ", name_of(matrix.output_dtype));
}

/// Checks tensor `i` of a call of fake_quantize.
inline void check_fake_quantize_tensor(const FakeQuantizeTensor& matrix, std::size_t i) {
  check_matrix(matrix, "fake_quantize", NthTensor{i});
}

}  // namespace moq::kernels
