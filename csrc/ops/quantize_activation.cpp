// moq::quantize_activation and moq::fake_quantize_activation: activations of the INT8 matrix
// products.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/quantizer.h"
#include "kernels/quantize.h"

namespace moq::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Quantized = std::tuple<Tensor, Tensor, Tensor>;

// ------------------------------------------------------------------------------------------ checks

void check_given(const char* where, const char* what, const Tensor& given, at::ScalarType type,
                 const Tensor& input) {
  check_type(where, what, given, type);
  TORCH_CHECK_VALUE(given.dim() == 1 && given.sym_size(0) == 1, where, ": ", what,
                    " must have shape [1], got ", given.sym_sizes());
  TORCH_CHECK_VALUE(given.device() == input.device(), where, ": ", what, " must be on ",
                    input.device(), " as the input is, got ", given.device());
}

/// @return the mode that is named
QuantMode check_activation(const char* where, const Tensor& input, const OptionalTensor& scale,
                           const OptionalTensor& zero_point, std::string_view mode_name) {
  check_float(where, "input", input.scalar_type());
  TORCH_CHECK_VALUE(input.dim() >= 1, where, ": input must be [..., features], got a scalar");
  const bool asymmetric = mode_name == "asymmetric";
  TORCH_CHECK_VALUE(asymmetric || mode_name == "symmetric", where,
                    ": mode must be symmetric or asymmetric, got ", mode_name);
  const bool needs_zero_point = scale.has_value() && asymmetric;
  TORCH_CHECK_VALUE(zero_point.has_value() == needs_zero_point, where,
                    ": zero_point must come with a scale and mode asymmetric, and only then, got ",
                    needs_zero_point ? "none" : "one");
  if (scale.has_value()) {
    check_given(where, "scale", *scale, at::kFloat, input);
  }
  if (zero_point.has_value()) {
    check_given(where, "zero_point", *zero_point, at::kInt, input);
  }
  return asymmetric ? QuantMode::kAsymmetric : QuantMode::kSymmetric;
}

// ---------------------------------------------------------------------------------- implementation

/// One row per token: the input as a matrix over its last dimension, made contiguous.
kernels::QuantizeActivationArgs describe_activation(const Tensor& contiguous,
                                                    const OptionalTensor& scale,
                                                    const OptionalTensor& zero_point,
                                                    QuantMode mode) {
  const std::int64_t cols = contiguous.size(-1);
  return {.input = contiguous.const_data_ptr(),
          .static_scale = scale.has_value() ? scale->const_data_ptr<float>() : nullptr,
          .static_zero_point =
              zero_point.has_value() ? zero_point->const_data_ptr<std::int32_t>() : nullptr,
          .rows = c10::multiply_integers(contiguous.sizes().slice(0, contiguous.dim() - 1)),
          .cols = cols,
          .row_stride = cols,
          .input_dtype = dtype_of(contiguous.scalar_type()),
          .mode = mode};
}

void run_activation(const Tensor& input, const kernels::QuantizeActivationArgs& args) {
  run_on(
      "quantize_activation", input.device(), [&] { kernels::cpu::quantize_activation(args); },
      [&](auto stream) { kernels::cuda::quantize_activation(args, stream); });
}

Quantized empty_quantized_activation(const Tensor& input, const OptionalTensor& scale) {
  c10::SymDimVector tokens(input.sym_sizes().begin(), input.sym_sizes().end());
  tokens.back() = 1;
  const c10::SymIntArrayRef sizes = scale.has_value() ? scale->sym_sizes() : tokens;
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar)),
          at::empty_symint(sizes, input.options().dtype(at::kFloat)),
          at::empty_symint(sizes, input.options().dtype(at::kInt))};
}

Quantized quantize_activation(const Tensor& input, const OptionalTensor& scale,
                              const OptionalTensor& zero_point, std::string_view mode_name) {
  const QuantMode mode =
      check_activation("quantize_activation", input, scale, zero_point, mode_name);
  const Tensor contiguous = input.contiguous();
  auto result = empty_quantized_activation(input, scale);
  auto& [codes, scales, zero_points] = result;
  kernels::QuantizeActivationArgs args = describe_activation(contiguous, scale, zero_point, mode);
  args.codes = codes.mutable_data_ptr<std::int8_t>();
  if (scale.has_value()) {
    scales.copy_(*scale);
    if (zero_point.has_value()) {
      zero_points.copy_(*zero_point);
    } else {
      zero_points.zero_();
    }
  } else {
    args.scales = scales.mutable_data_ptr<float>();
    args.zero_points = zero_points.mutable_data_ptr<std::int32_t>();
  }
  run_activation(contiguous, args);
  return result;
}

Quantized quantize_activation_meta(const Tensor& input, const OptionalTensor& scale,
                                   const OptionalTensor& zero_point, std::string_view mode) {
  check_activation("quantize_activation", input, scale, zero_point, mode);
  return empty_quantized_activation(input, scale);
}

Tensor fake_quantize_activation(const Tensor& input, const OptionalTensor& scale,
                                const OptionalTensor& zero_point, std::string_view mode_name) {
  const QuantMode mode =
      check_activation("fake_quantize_activation", input, scale, zero_point, mode_name);
  const Tensor contiguous = input.contiguous();
  Tensor output = at::empty_like(contiguous);
  kernels::QuantizeActivationArgs args = describe_activation(contiguous, scale, zero_point, mode);
  args.output = output.mutable_data_ptr();
  run_activation(contiguous, args);
  return output;
}

Tensor fake_quantize_activation_meta(const Tensor& input, const OptionalTensor& scale,
                                     const OptionalTensor& zero_point, std::string_view mode) {
  check_activation("fake_quantize_activation", input, scale, zero_point, mode);
  return at::empty_symint(input.sym_sizes(), input.options().memory_format(c10::nullopt));
}

// ---------------------------------------------------------------------------------------- autograd

/// Straight-through estimator: the gradient passes unchanged, but for elements that a given scale
/// clamps, which get 0. The backward is made of differentiable operators.
class FakeQuantizeActivation : public torch::autograd::Function<FakeQuantizeActivation> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input,
                        const OptionalTensor& scale, const OptionalTensor& zero_point,
                        std::string_view mode) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moq::fake_quantize_activation", "")
                               .typed<decltype(fake_quantize_activation)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (scale.has_value()) {
      context->save_for_backward({input, *scale, zero_point.value_or(Tensor())});
    }
    return op.call(input, scale, zero_point, mode);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    if (saved.empty()) {
      return {gradients[0], Tensor(), Tensor(), Tensor()};
    }
    Tensor codes = saved[0].detach().to(at::kFloat).mul(saved[1].detach().reciprocal()).round();
    const bool asymmetric = saved[2].defined();
    if (asymmetric) {
      codes = codes.add(saved[2]);
    }
    const GridRange range =
        grid_range(8, asymmetric ? QuantMode::kAsymmetric : QuantMode::kSymmetric);
    const Tensor within = codes.ge(range.qmin).logical_and(codes.le(range.qmax));
    return {gradients[0].mul(within), Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize_activation_autograd(const Tensor& input, const OptionalTensor& scale,
                                         const OptionalTensor& zero_point, std::string_view mode) {
  return FakeQuantizeActivation::apply(input, scale, zero_point, mode);
}

Quantized quantize_activation_autograd(const Tensor& input, const OptionalTensor& scale,
                                       const OptionalTensor& zero_point, std::string_view mode) {
  return without_gradient<quantize_activation>("moq::quantize_activation", input, scale, zero_point,
                                               mode);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl("quantize_activation", quantize_activation);
  m.impl("fake_quantize_activation", fake_quantize_activation);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl("quantize_activation", quantize_activation);
  m.impl("fake_quantize_activation", fake_quantize_activation);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl("quantize_activation", quantize_activation_meta);
  m.impl("fake_quantize_activation", fake_quantize_activation_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl("quantize_activation", quantize_activation_autograd);
  m.impl("fake_quantize_activation", fake_quantize_activation_autograd);
}

}  // namespace moq::ops
