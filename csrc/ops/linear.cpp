// Linear layers on the CPU: packing a weight, multiplying by it, and the read bandwidth that the
// benchmarks hold the product against.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/common/parallel.h"
#include "kernels/cpu/bandwidth.h"
#include "kernels/linear.h"

namespace moq {
namespace {

using at::Tensor;
using kernels::Activation;
using kernels::InputMode;
using kernels::LinearShape;
using kernels::WeightFormat;

// ----------------------------------------------------------------------------------------- checks

template <typename Enum, std::size_t kSize>
Enum parse(const char* what, std::string_view name, const std::array<Enum, kSize>& values,
           const char* (*name_of_value)(Enum)) {
  std::string known;
  for (const Enum value : values) {
    if (name == name_of_value(value)) {
      return value;
    }
    known += known.empty() ? "" : ", ";
    known += name_of_value(value);
  }
  TORCH_CHECK_VALUE(false, what, " must be one of ", known, ", got ", name);
}

WeightFormat parse_format(std::string_view name) {
  return parse(
      "linear: format", name,
      std::array{WeightFormat::kInt8, WeightFormat::kInt4, WeightFormat::kInt2,
                 WeightFormat::kFloat32, WeightFormat::kBFloat16, WeightFormat::kFloat16},
      +[](WeightFormat format) { return kernels::name_of(format); });
}

Activation parse_activation(std::string_view name) {
  return parse(
      "linear: activation", name,
      std::array{Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
                 Activation::kQuickGelu, Activation::kSilu, Activation::kTanh},
      +[](Activation activation) { return kernels::name_of(activation); });
}

InputMode parse_input_mode(std::string_view name) {
  return parse(
      "linear: input_mode", name,
      std::array{InputMode::kFloat32, InputMode::kDynamicInt8, InputMode::kStaticInt8},
      +[](InputMode mode) {
        return mode == InputMode::kFloat32       ? "float32"
               : mode == InputMode::kDynamicInt8 ? "dynamic_int8"
                                                 : "static_int8";
      });
}

at::ScalarType element_type(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return at::kFloat;
    case WeightFormat::kBFloat16:
      return at::kBFloat16;
    case WeightFormat::kFloat16:
      return at::kHalf;
    default:
      return at::kChar;
  }
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

int64_t size_of(const Tensor& tensor, int64_t dim) {
  return tensor.sym_size(dim).guard_int(__FILE__, __LINE__);
}

/// Shape of the weight that pack_linear's arguments describe.
LinearShape check_weight(const Tensor& weight, const std::optional<Tensor>& scales,
                         const std::optional<Tensor>& zero_points, std::string_view format_name) {
  const WeightFormat format = parse_format(format_name);
  const bool integer = kernels::is_integer(format);
  TORCH_CHECK_VALUE(weight.dim() == 2, "pack_linear: weight must be a matrix, got ", weight.dim(),
                    " dimensions");
  TORCH_CHECK_TYPE(weight.scalar_type() == element_type(format), "pack_linear: weight must be ",
                   element_type(format), " for format ", format_name, ", got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(integer == scales.has_value(),
                    "pack_linear: integer formats need scales and float formats have none, got ",
                    format_name, scales.has_value() ? " with scales" : " without");
  TORCH_CHECK_VALUE(integer || !zero_points.has_value(),
                    "pack_linear: only integer formats have zero points, got ", format_name);
  LinearShape shape{.n = size_of(weight, 0),
                    .k = size_of(weight, 1),
                    .format = format,
                    .group_size = size_of(weight, 1),
                    .asymmetric = zero_points.has_value()};
  if (integer) {
    TORCH_CHECK_TYPE(scales->scalar_type() == at::kFloat,
                     "pack_linear: scales must be float32, got ", scales->scalar_type());
    TORCH_CHECK_VALUE(scales->dim() == 2 && size_of(*scales, 0) == shape.n,
                      "pack_linear: scales must be [", shape.n, ", groups], got ",
                      scales->sym_sizes());
    const int64_t groups = size_of(*scales, 1);
    TORCH_CHECK_VALUE(groups > 0 && shape.k % groups == 0,
                      "pack_linear: the groups of scales must divide the columns, got ", groups,
                      " and ", shape.k);
    shape.group_size = shape.k / groups;
  }
  if (zero_points.has_value()) {
    TORCH_CHECK_TYPE(zero_points->scalar_type() == at::kInt,
                     "pack_linear: zero_points must be int32, got ", zero_points->scalar_type());
    TORCH_CHECK_VALUE(zero_points->sym_sizes() == scales->sym_sizes(),
                      "pack_linear: zero_points must have the shape of scales, got ",
                      zero_points->sym_sizes(), " and ", scales->sym_sizes());
  }
  return shape;
}

void check_vector_of(const char* what, const std::optional<Tensor>& tensor,
                     c10::SymIntArrayRef sizes) {
  if (tensor.has_value()) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "linear: ", what,
                     " must be float32, got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->sym_sizes() == sizes, "linear: ", what, " must be ", sizes, ", got ",
                      tensor->sym_sizes());
  }
}

/// Shape of the weight behind `packed`; also checks every other argument of `linear`.
LinearShape check_linear(const Tensor& input, const Tensor& packed, int64_t out_features,
                         std::string_view format, std::optional<int64_t> group_size,
                         bool asymmetric, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& residual) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat, "linear: input must be float32, got ",
                   input.scalar_type());
  TORCH_CHECK_VALUE(input.dim() == 2, "linear: input must be [m, k], got ", input.dim(),
                    " dimensions");
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte && packed.dim() == 1,
                   "linear: packed must be what pack_linear returned, got ", packed.dim(),
                   " dimensions of ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.is_contiguous(),
                    "linear: packed must be contiguous, as pack_linear returned it, got strides ",
                    packed.sym_strides());
  const int64_t k = size_of(input, 1);
  const LinearShape shape{.n = out_features,
                          .k = k,
                          .format = parse_format(format),
                          .group_size = group_size.value_or(k),
                          .asymmetric = asymmetric};
  const auto bytes = static_cast<int64_t>(kernels::cpu::packed_linear_size(shape));
  TORCH_CHECK_VALUE(size_of(packed, 0) == bytes, "linear: a packed weight of ", out_features, " x ",
                    k, " in ", format, " has ", bytes, " bytes, got ", packed.sym_size(0));
  const std::array<c10::SymInt, 1> outputs{c10::SymInt(out_features)};
  const std::array<c10::SymInt, 2> result{input.sym_size(0), c10::SymInt(out_features)};
  check_vector_of("bias", bias, outputs);
  check_vector_of("residual", residual, result);
  return shape;
}

// ------------------------------------------------------------------------------------------- CPU

Tensor pack_linear_cpu(const Tensor& weight, const std::optional<Tensor>& scales,
                       const std::optional<Tensor>& zero_points, std::string_view format) {
  const LinearShape shape = check_weight(weight, scales, zero_points, format);
  Tensor packed = at::empty({static_cast<int64_t>(kernels::cpu::packed_linear_size(shape))},
                            weight.options().dtype(at::kByte));
  const std::optional<Tensor> contiguous_scales =
      scales.has_value() ? std::optional(scales->contiguous()) : std::nullopt;
  const std::optional<Tensor> contiguous_zero_points =
      zero_points.has_value() ? std::optional(zero_points->contiguous()) : std::nullopt;
  const kernels::ThreadScope scope(at::get_num_threads());
  kernels::cpu::pack_linear({.shape = shape,
                             .weight = weight.const_data_ptr(),
                             .row_stride = weight.stride(0),
                             .col_stride = weight.stride(1),
                             .scales = data_or_null(contiguous_scales),
                             .zero_points = contiguous_zero_points.has_value()
                                                ? contiguous_zero_points->const_data_ptr<int32_t>()
                                                : nullptr,
                             .packed = packed.mutable_data_ptr()});
  return packed;
}

Tensor linear_cpu(const Tensor& input, const Tensor& packed, int64_t out_features,
                  std::string_view format, std::optional<int64_t> group_size, bool asymmetric,
                  const std::optional<Tensor>& bias, std::string_view activation,
                  const std::optional<Tensor>& residual, std::string_view input_mode,
                  std::optional<double> input_scale) {
  const LinearShape shape =
      check_linear(input, packed, out_features, format, group_size, asymmetric, bias, residual);
  const Tensor rows = input.contiguous();
  const std::optional<Tensor> contiguous_bias =
      bias.has_value() ? std::optional(bias->contiguous()) : std::nullopt;
  const std::optional<Tensor> contiguous_residual =
      residual.has_value() ? std::optional(residual->contiguous()) : std::nullopt;
  Tensor output = at::empty({input.size(0), out_features}, input.options());
  const kernels::ThreadScope scope(at::get_num_threads());
  kernels::cpu::linear({.input = rows.const_data_ptr<float>(),
                        .m = rows.size(0),
                        .input_stride = shape.k,
                        .weight = {.shape = shape, .data = packed.const_data_ptr()},
                        .bias = data_or_null(contiguous_bias),
                        .activation = parse_activation(activation),
                        .residual = data_or_null(contiguous_residual),
                        .residual_stride = out_features,
                        .input_mode = parse_input_mode(input_mode),
                        .input_scale = static_cast<float>(input_scale.value_or(0.0)),
                        .output = output.mutable_data_ptr<float>(),
                        .output_stride = out_features});
  return output;
}

double read_bandwidth_cpu(const Tensor& buffer, bool prefetch) {
  TORCH_CHECK_VALUE(buffer.is_contiguous(), "read_bandwidth: buffer must be contiguous");
  const kernels::ThreadScope scope(at::get_num_threads());
  const std::span bytes(static_cast<const std::byte*>(buffer.const_data_ptr()), buffer.nbytes());
  return kernels::cpu::measure_read(bytes, prefetch).bytes_per_second;
}

// ------------------------------------------------------------------------------------------ Meta

Tensor pack_linear_meta(const Tensor& weight, const std::optional<Tensor>& scales,
                        const std::optional<Tensor>& zero_points, std::string_view format) {
  const LinearShape shape = check_weight(weight, scales, zero_points, format);
  return at::empty({static_cast<int64_t>(kernels::cpu::packed_linear_size(shape))},
                   weight.options().dtype(at::kByte));
}

Tensor linear_meta(const Tensor& input, const Tensor& packed, int64_t out_features,
                   std::string_view format, std::optional<int64_t> group_size, bool asymmetric,
                   const std::optional<Tensor>& bias, std::string_view activation,
                   const std::optional<Tensor>& residual, std::string_view input_mode,
                   std::optional<double> /*input_scale*/) {
  check_linear(input, packed, out_features, format, group_size, asymmetric, bias, residual);
  parse_activation(activation);
  parse_input_mode(input_mode);
  return at::empty_symint({input.sym_size(0), out_features}, input.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl("pack_linear", pack_linear_cpu);
  m.impl("linear", linear_cpu);
  m.impl("read_bandwidth", read_bandwidth_cpu);
}

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl("pack_linear", pack_linear_meta);
  m.impl("linear", linear_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl("pack_linear", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq
