#include "kernels/linear.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/cpu/linear_layout.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cpu {
namespace {

void check(const LinearArgs& args) {
  const LinearShape& shape = args.weight.shape;
  const std::size_t packed_size = packed_linear_size(shape);
  MOQ_CHECK(args.m >= 0, "linear: m must be >= 0, got ", args.m);
  if (args.m == 0 || shape.n == 0) {
    return;
  }
  MOQ_CHECK(packed_size == 0 || args.weight.data != nullptr, "linear: weight must not be null");
  MOQ_CHECK(shape.k == 0 || args.input != nullptr, "linear: input must not be null");
  MOQ_CHECK(args.output != nullptr, "linear: output must not be null");
  MOQ_CHECK(args.m == 1 || args.input_stride >= shape.k, "linear: input_stride must be >= k, got ",
            args.input_stride, " and ", shape.k);
  MOQ_CHECK(args.m == 1 || args.output_stride >= shape.n,
            "linear: output_stride must be >= n, got ", args.output_stride, " and ", shape.n);
  MOQ_CHECK(args.residual == nullptr || args.m == 1 || args.residual_stride >= shape.n,
            "linear: residual_stride must be >= n, got ", args.residual_stride, " and ", shape.n);
  MOQ_CHECK(is_integer(shape.format) || args.input_mode == InputMode::kFloat32,
            "linear: INT8 input needs an integer weight, got ", name_of(shape.format));
  MOQ_CHECK(args.input_mode != InputMode::kStaticInt8 ||
                (args.input_scale > 0.0F && std::isfinite(args.input_scale)),
            "linear: input_scale must be positive and finite, got ", args.input_scale);
}

/// One row of the input as integers, and the real value of one unit.
double to_integers(const LinearArgs& args, const float* row, std::vector<std::int32_t>& x) {
  const std::int64_t k = args.weight.shape.k;
  float absmax = 0.0F;
  for (std::int64_t i = 0; i < k; ++i) {
    if (!std::isfinite(row[i])) {
      std::fill(x.begin(), x.end(), 0);
      return std::numeric_limits<double>::quiet_NaN();
    }
    absmax = std::max(absmax, std::fabs(row[i]));
  }
  if (args.input_mode == InputMode::kFloat32) {
    const int exponent = absmax > 0.0F ? 29 - std::ilogb(absmax) : 0;
    for (std::int64_t i = 0; i < k; ++i) {
      x[i] =
          static_cast<std::int32_t>(std::rint(std::ldexp(static_cast<double>(row[i]), exponent)));
    }
    return std::ldexp(1.0, -exponent);
  }
  const float extent =
      args.input_mode == InputMode::kDynamicInt8 ? absmax : args.input_scale * 127.0F;
  GridParams grid = make_grid(-extent, extent, 8, QuantMode::kSymmetric, DType::kFloat32);
  if (args.input_mode == InputMode::kStaticInt8) {
    grid.scale = args.input_scale;
    grid.inverse_scale = 1.0F / args.input_scale;
  }
  for (std::int64_t i = 0; i < k; ++i) {
    x[i] = quantize_one(row[i], grid, Rounding::kNearest, 0.0F);
  }
  return grid.scale;
}

float activate(double x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kGelu:
      return static_cast<float>(0.5 * x * (1.0 + std::erf(x * M_SQRT1_2)));
    case Activation::kGeluTanh:
      return static_cast<float>(
          0.5 * x * (1.0 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x))));
    case Activation::kRelu:
      return static_cast<float>(x < 0.0 ? 0.0 : x);
    case Activation::kSilu:
      return static_cast<float>(x / (1.0 + std::exp(-x)));
    case Activation::kQuickGelu:
      return static_cast<float>(x / (1.0 + std::exp(-1.702 * x)));
    case Activation::kTanh:
      return static_cast<float>(std::tanh(x));
  }
  return static_cast<float>(x);
}

}  // namespace

void linear(const LinearArgs& args) {
  check(args);
  const LinearShape& shape = args.weight.shape;
  std::vector<float> weight_row(shape.k);
  std::vector<std::int32_t> x(shape.k);
  PackedLinear codes = args.weight;
  for (std::int64_t i = 0; i < args.m; ++i) {
    const float* input = args.input + i * args.input_stride;
    const double unit = is_integer(shape.format) ? to_integers(args, input, x) : 1.0;
    for (std::int64_t j = 0; j < shape.n; ++j) {
      unpack_linear_row(codes, j, weight_row.data());
      double sum = 0.0;
      for (std::int64_t c = 0; c < shape.k; ++c) {
        sum += static_cast<double>(weight_row[c]) *
               (is_integer(shape.format) ? x[c] : static_cast<double>(input[c]));
      }
      double result = sum * unit + (args.bias != nullptr ? args.bias[j] : 0.0F);
      float value = activate(static_cast<float>(result), args.activation);
      if (args.residual != nullptr) {
        value += args.residual[i * args.residual_stride + j];
      }
      args.output[i * args.output_stride + j] = value;
    }
  }
}

}  // namespace moq::kernels::cpu
