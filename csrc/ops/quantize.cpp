// moq::quantize and moq::dequantize: weights to codes and back.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/quantizer.h"
#include "kernels/quantize.h"

namespace moq::ops {
namespace {

using at::Tensor;
using kernels::Granularity;

// ------------------------------------------------------------------------------- weights to codes

using QuantizedWeight = std::tuple<Tensor, Tensor, Tensor>;

/// Shapes and dtypes of what quantize returns.
QuantizedWeight empty_quantized(const Tensor& weight, const Quantizer& quantizer) {
  const Features features = features_of(weight, quantizer.transposed);
  const auto options = weight.options().memory_format(c10::nullopt);
  const c10::SymDimVector groups = scale_sizes(weight, quantizer);
  return {
      at::empty_symint({features.out, features.in},
                       options.dtype(quantizer.num_bits <= 8 ? at::kChar : at::kShort)),
      at::empty_symint(groups, options.dtype(quantizer.scale_dtype.value_or(weight.scalar_type()))),
      at::empty_symint(groups, options.dtype(at::kInt))};
}

QuantizedWeight quantize(const Tensor& weight, std::int64_t num_bits, std::string_view granularity,
                         std::int64_t group_size, std::string_view mode, std::string_view rounding,
                         std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                         bool transposed, std::optional<at::ScalarType> scale_dtype,
                         std::string_view scale_rule) {
  const Quantizer quantizer =
      parse_quantizer("quantize", num_bits, granularity, group_size, mode, rounding, seed, step,
                      name_hash, transposed, /*blend_ratio=*/0.0, scale_dtype, scale_rule);
  check_quantizer("quantize", weight, quantizer);
  QuantizedWeight result = empty_quantized(weight, quantizer);
  auto& [codes, scales, zero_points] = result;
  kernels::FakeQuantizeTensor matrix = describe(weight, quantizer);
  matrix.codes = codes.mutable_data_ptr();
  matrix.codes_dtype = dtype_of(codes.scalar_type());
  matrix.scales = scales.mutable_data_ptr();
  matrix.zero_points = zero_points.mutable_data_ptr<std::int32_t>();
  run_fake_quantize(weight, matrix, quantizer);
  return result;
}

QuantizedWeight quantize_meta(const Tensor& weight, std::int64_t num_bits,
                              std::string_view granularity, std::int64_t group_size,
                              std::string_view mode, std::string_view rounding, std::int64_t seed,
                              std::int64_t step, std::int64_t name_hash, bool transposed,
                              std::optional<at::ScalarType> scale_dtype,
                              std::string_view scale_rule) {
  const Quantizer quantizer =
      parse_quantizer("quantize", num_bits, granularity, group_size, mode, rounding, seed, step,
                      name_hash, transposed, /*blend_ratio=*/0.0, scale_dtype, scale_rule);
  check_quantizer("quantize", weight, quantizer);
  return empty_quantized(weight, quantizer);
}

// ------------------------------------------------------------------------------- codes to weights

/// Shapes of the scales tell the granularity: [1], [out, 1], [out, groups] or, where rows share
/// them, [row groups, 1].
void check_dequantize(const Tensor& codes, const Tensor& scales,
                      const std::optional<Tensor>& zero_points,
                      std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(codes.dim() == 2,
                    "dequantize: codes must be a matrix [out_features, in_features], got ",
                    codes.dim(), " dimensions");
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar || codes.scalar_type() == at::kShort,
                   "dequantize: codes must be int8 or int16, got ", name_of(codes.scalar_type()));
  check_float("dequantize", "scales", scales.scalar_type());
  check_float("dequantize", "dtype", dtype.value_or(scales.scalar_type()));
  const bool one_scale = scales.dim() == 1 && scales.sym_size(0) == 1;
  const bool rows_of_scales = scales.dim() == 2 && scales.sym_size(0) == codes.sym_size(0) &&
                              scales.sym_size(1) > 0 && codes.sym_size(1) % scales.sym_size(1) == 0;
  const bool row_groups = scales.dim() == 2 && scales.sym_size(1) == 1 && scales.sym_size(0) > 0 &&
                          codes.sym_size(0) % scales.sym_size(0) == 0;
  TORCH_CHECK_VALUE(one_scale || rows_of_scales || row_groups,
                    "dequantize: scales must be [1], [out_features, groups] with groups dividing "
                    "the input features, or [groups, 1] dividing the output features, got ",
                    scales.sym_sizes(), " for codes ", codes.sym_sizes());
  TORCH_CHECK_VALUE(scales.device() == codes.device(), "dequantize: scales must be on ",
                    codes.device(), " as the codes are, got ", scales.device());
  if (zero_points.has_value()) {
    check_type("dequantize", "zero_points", *zero_points, at::kInt);
    TORCH_CHECK_VALUE(zero_points->sym_sizes() == scales.sym_sizes(),
                      "dequantize: zero_points must have the scales' shape ", scales.sym_sizes(),
                      ", got ", zero_points->sym_sizes());
    TORCH_CHECK_VALUE(zero_points->device() == codes.device(),
                      "dequantize: zero_points must be on ", codes.device(),
                      " as the codes are, got ", zero_points->device());
  }
}

Tensor empty_dequantized(const Tensor& codes, const Tensor& scales, bool transposed,
                         std::optional<at::ScalarType> dtype) {
  const Features features = features_of(codes, transposed);
  return at::empty_symint({features.out, features.in},
                          codes.options().dtype(dtype.value_or(scales.scalar_type())));
}

Tensor dequantize(const Tensor& codes, const Tensor& scales,
                  const std::optional<Tensor>& zero_points, bool transposed,
                  std::optional<at::ScalarType> dtype) {
  check_dequantize(codes, scales, zero_points, dtype);
  Tensor output = empty_dequantized(codes, scales, transposed, dtype);
  const Tensor packed_codes = codes.contiguous();
  const Tensor packed_scales = scales.contiguous();
  const Tensor packed_zero_points = zero_points.has_value() ? zero_points->contiguous() : Tensor();
  const bool one_scale = scales.dim() == 1;
  const std::int64_t groups = one_scale ? 1 : scales.size(1);
  const bool rows_share = !one_scale && scales.size(0) != codes.size(0);
  const kernels::DequantizeArgs args{
      .codes = packed_codes.const_data_ptr(),
      .scales = packed_scales.const_data_ptr(),
      .zero_points =
          zero_points.has_value() ? packed_zero_points.const_data_ptr<std::int32_t>() : nullptr,
      .output = output.mutable_data_ptr(),
      .rows = codes.size(0),
      .cols = codes.size(1),
      .row_stride = output.stride(transposed ? 1 : 0),
      .col_stride = output.stride(transposed ? 0 : 1),
      .group_size = rows_share ? codes.size(0) / scales.size(0) : codes.size(1) / groups,
      .codes_dtype = dtype_of(codes.scalar_type()),
      .scale_dtype = dtype_of(scales.scalar_type()),
      .output_dtype = dtype_of(output.scalar_type()),
      .granularity = one_scale     ? Granularity::kPerTensor
                     : rows_share  ? Granularity::kPerRows
                     : groups == 1 ? Granularity::kPerChannel
                                   : Granularity::kPerGroup};
  run_on(
      "dequantize", codes.device(), [&] { kernels::cpu::dequantize(args); },
      [&](auto stream) { kernels::cuda::dequantize(args, stream); });
  return output;
}

Tensor dequantize_meta(const Tensor& codes, const Tensor& scales,
                       const std::optional<Tensor>& zero_points, bool transposed,
                       std::optional<at::ScalarType> dtype) {
  check_dequantize(codes, scales, zero_points, dtype);
  return empty_dequantized(codes, scales, transposed, dtype);
}

// ---------------------------------------------------------------------------------------- autograd

QuantizedWeight quantize_autograd(const Tensor& weight, std::int64_t num_bits,
                                  std::string_view granularity, std::int64_t group_size,
                                  std::string_view mode, std::string_view rounding,
                                  std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                                  bool transposed, std::optional<at::ScalarType> scale_dtype,
                                  std::string_view scale_rule) {
  return without_gradient<quantize>("moq::quantize", weight, num_bits, granularity, group_size,
                                    mode, rounding, seed, step, name_hash, transposed, scale_dtype,
                                    scale_rule);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl("quantize", quantize);
  m.impl("dequantize", dequantize);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl("quantize", quantize);
  m.impl("dequantize", dequantize);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl("quantize", quantize_meta);
  m.impl("dequantize", dequantize_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl("quantize", quantize_autograd);
  m.impl("dequantize", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq::ops
