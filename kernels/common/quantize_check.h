#pragma once

#include "kernels/common/check.h"
#include "kernels/common/visit.h"
#include "kernels/quantize.h"

/// What the CPU and the CUDA bodies of kernels/quantize.h refuse.
namespace moq::kernels {

inline void check_quantize_activation(const QuantizeActivationArgs& args) {
  MOQ_CHECK(is_float(args.input_dtype),
            "quantize_activation: input must be float32, float16 or bfloat16, got ",
            name_of(args.input_dtype));
  MOQ_CHECK(args.rows >= 0 && args.cols >= 0, "quantize_activation: shape must be >= 0, got ",
            args.rows, " x ", args.cols);
  MOQ_CHECK(args.mode == QuantMode::kSymmetric || args.mode == QuantMode::kAsymmetric,
            "quantize_activation: mode must be symmetric or asymmetric, got another");
  const bool needs_zero_point = args.static_scale != nullptr && !is_symmetric(args.mode);
  MOQ_CHECK(
      (args.static_zero_point != nullptr) == needs_zero_point,
      "quantize_activation: a zero point must come with a given scale in asymmetric mode, and "
      "only then, got ",
      needs_zero_point ? "none" : "one");
}

/// The grid that a call's rows share; without a given scale they share none.
MOQ_HOST_DEVICE inline GridParams static_grid(const QuantizeActivationArgs& args) {
  return grid_of_scale(*args.static_scale, 8, args.mode,
                       args.static_zero_point != nullptr ? *args.static_zero_point : 0);
}

inline void check_dequantize(const DequantizeArgs& args) {
  MOQ_CHECK(args.codes_dtype == DType::kInt8 || args.codes_dtype == DType::kInt16,
            "dequantize: codes must be int8 or int16, got ", name_of(args.codes_dtype));
  MOQ_CHECK(is_float(args.scale_dtype) && is_float(args.output_dtype),
            "dequantize: scales and output must be float32, float16 or bfloat16, got ",
            name_of(args.scale_dtype), " and ", name_of(args.output_dtype));
  MOQ_CHECK(args.rows >= 0 && args.cols >= 0, "dequantize: shape must be >= 0, got ", args.rows,
            " x ", args.cols);
  MOQ_CHECK(args.granularity != Granularity::kPerGroup ||
                (args.group_size > 0 && args.cols % args.group_size == 0),
            "dequantize: group_size must divide the columns, got ", args.group_size, " and ",
            args.cols);
  MOQ_CHECK(args.granularity != Granularity::kPerRows ||
                (args.group_size > 0 && args.rows % args.group_size == 0),
            "dequantize: group_size must divide the rows, got ", args.group_size, " and ",
            args.rows);
}

/// Group that element (row, col) belongs to.
MOQ_HOST_DEVICE inline std::int64_t group_of(const DequantizeArgs& args, std::int64_t row,
                                             std::int64_t col) {
  switch (args.granularity) {
    case Granularity::kPerTensor:
      return 0;
    case Granularity::kPerChannel:
      return row;
    case Granularity::kPerRows:
      return row / args.group_size;
    default:
      return row * (args.cols / args.group_size) + col / args.group_size;
  }
}

}  // namespace moq::kernels
