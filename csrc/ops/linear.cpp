// moq::linear and moq::norm_linear: a packed weight times activations, with what stands before and
// behind the product.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/linear_call.h"

namespace moq::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

LinearCall describe_linear(const Tensor& input, const Tensor& packed, std::int64_t out_features,
                           std::string_view format, std::optional<std::int64_t> group_size,
                           bool asymmetric, const OptionalTensor& bias, std::string_view activation,
                           bool gated, const OptionalTensor& residual, std::string_view input_mode,
                           std::optional<double> input_scale,
                           std::optional<std::int64_t> input_zero_point,
                           std::optional<at::ScalarType> dtype, bool weight_is_ready) {
  constexpr const char* kWhere = "linear";
  LinearCall call{
      .where = kWhere,
      .input = input,
      .packed = packed,
      .shape = shape_of_weight(kWhere, input, out_features, format, group_size, asymmetric),
      .bias = bias,
      .residual = residual,
      .activation = parse_activation(kWhere, activation),
      .gated = gated,
      .input_mode = parse_input_mode(kWhere, input_mode),
      .input_scale = input_scale,
      .input_zero_point = input_zero_point,
      .dtype = dtype,
      .weight_is_ready = weight_is_ready};
  check(call);
  return call;
}

LinearCall describe_norm_linear(const Tensor& input, const Tensor& norm_weight,
                                const OptionalTensor& norm_bias, const Tensor& packed,
                                std::int64_t out_features, std::string_view norm, double epsilon,
                                std::string_view format, std::optional<std::int64_t> group_size,
                                bool asymmetric, const OptionalTensor& bias,
                                std::string_view activation, bool gated,
                                const OptionalTensor& residual, std::string_view input_mode,
                                std::optional<double> input_scale,
                                std::optional<std::int64_t> input_zero_point,
                                std::optional<at::ScalarType> dtype, bool weight_is_ready) {
  constexpr const char* kWhere = "norm_linear";
  LinearCall call{
      .where = kWhere,
      .input = input,
      .packed = packed,
      .shape = shape_of_weight(kWhere, input, out_features, format, group_size, asymmetric),
      .bias = bias,
      .residual = residual,
      .activation = parse_activation(kWhere, activation),
      .gated = gated,
      .input_mode = parse_input_mode(kWhere, input_mode),
      .input_scale = input_scale,
      .input_zero_point = input_zero_point,
      .norm = parse_norm(kWhere, norm),
      .norm_weight = norm_weight,
      .norm_bias = norm_bias,
      .epsilon = epsilon,
      .dtype = dtype,
      .weight_is_ready = weight_is_ready};
  check(call);
  return call;
}

Tensor run(const LinearCall& call) {
  Tensor output = empty_output(call);
  run_on(
      call.where, call.input.device(), [&] { run_on_cpu(call, output); },
      [&](auto stream) {
        run_on_gpu(call, {.output = output.mutable_data_ptr(), .output_stride = output.size(1)},
                   stream);
      });
  return output;
}

using Linear = Described<&describe_linear, &run, &empty_output>;
using NormLinear = Described<&describe_norm_linear, &run, &empty_output>;

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl("linear", Linear::on_device);
  m.impl("norm_linear", NormLinear::on_device);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl("linear", Linear::on_device);
  m.impl("norm_linear", NormLinear::on_device);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl("linear", Linear::on_meta);
  m.impl("norm_linear", NormLinear::on_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl("linear", torch::autograd::autogradNotImplementedFallback());
  m.impl("norm_linear", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq::ops
