#pragma once

#include <cstdint>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/visit.h"
#include "kernels/fake_quantize.h"

/// What the CPU and the CUDA body of fake_quantize share before they differ.
namespace moq::kernels {

/// Checks tensor `i` of a call.
/// @throws moq::Error as documented in kernels/fake_quantize.h, for all that the host can see.
inline void check_fake_quantize_tensor(const FakeQuantizeTensor& matrix, std::size_t i) {
  MOQ_CHECK(matrix.rows >= 0 && matrix.cols >= 0, "fake_quantize: shape of tensor ", i,
            " must be >= 0, got ", matrix.rows, " x ", matrix.cols);
  MOQ_CHECK(matrix.input != nullptr || matrix.rows == 0 || matrix.cols == 0,
            "fake_quantize: input of tensor ", i, " must not be null");
  MOQ_CHECK(
      is_float(matrix.input_dtype) && is_float(matrix.output_dtype) && is_float(matrix.scale_dtype),
      "fake_quantize: input, output and scale of tensor ", i,
      " must be float32, float16 or bfloat16, got ", name_of(matrix.input_dtype), ", ",
      name_of(matrix.output_dtype), " and ", name_of(matrix.scale_dtype));
  MOQ_CHECK(matrix.codes_dtype == DType::kInt8 || matrix.codes_dtype == DType::kInt16,
            "fake_quantize: codes of tensor ", i, " must be int8 or int16, got ",
            name_of(matrix.codes_dtype));
  MOQ_CHECK(matrix.granularity != Granularity::kPerGroup ||
                (matrix.group_size > 0 && matrix.cols % matrix.group_size == 0),
            "fake_quantize: group_size of tensor ", i, " must divide its columns, got ",
            matrix.group_size, " and ", matrix.cols);
  MOQ_CHECK(matrix.granularity != Granularity::kPerRows ||
                (matrix.group_size > 0 && matrix.rows % matrix.group_size == 0),
            "fake_quantize: group_size of tensor ", i, " must divide its rows, got ",
            matrix.group_size, " and ", matrix.rows);
  MOQ_CHECK(matrix.rounding == Rounding::kNearest || matrix.mode == QuantMode::kSymmetric ||
                matrix.mode == QuantMode::kAsymmetric,
            "fake_quantize: ternary and binary codes of tensor ", i,
            " are signs: rounding must be nearest, got stochastic");
  MOQ_CHECK(matrix.collected == nullptr || rows_share_scales(matrix),
            "fake_quantize: collected groups of tensor ", i,
            " must be those of a matrix whose rows share scales");
  MOQ_CHECK(matrix.scale_rule != ScaleRule::kGiven || matrix.given_absmax != nullptr ||
                num_groups(matrix) == 0,
            "fake_quantize: given_absmax of tensor ", i, " must not be null");
  MOQ_CHECK(matrix.scale_rule != ScaleRule::kGiven || matrix.mode == QuantMode::kSymmetric,
            "fake_quantize: given scales of tensor ", i,
            " are those of a symmetric grid, got another");
  MOQ_CHECK(matrix.output != matrix.input || matrix.output_dtype == matrix.input_dtype ||
                matrix.output == nullptr,
            "fake_quantize: tensor ", i, " can only be its own output in its own dtype, got ",
            name_of(matrix.input_dtype), " and ", name_of(matrix.output_dtype));
}

}  // namespace moq::kernels
