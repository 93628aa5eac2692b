// moq::quantize_activation and moq::fake_quantize_activation: activations of the INT8 matrix
// products.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/quantizer.h"
#include "kernels/quantize.h"

namespace moq::ops {
namespace {

using at::Tensor;

// ------------------------------------------------------------------------------------------ checks

void check_activation(const char* where, const Tensor& input, const std::optional<Tensor>& scale) {
  check_float(where, "input", input.scalar_type());
  TORCH_CHECK_VALUE(input.dim() >= 1, where, ": input must be [..., features], got a scalar");
  if (scale.has_value()) {
    TORCH_CHECK_TYPE(scale->scalar_type() == at::kFloat, where, ": scale must be float32, got ",
                     scale->scalar_type());
    TORCH_CHECK_VALUE(scale->dim() == 1 && scale->sym_size(0) == 1, where,
                      ": scale must have shape [1], got ", scale->sym_sizes());
    TORCH_CHECK_VALUE(scale->device() == input.device(), where, ": scale must be on ",
                      input.device(), " as the input is, got ", scale->device());
  }
}

// ---------------------------------------------------------------------------------- implementation

/// One row per token: the input as a matrix over its last dimension, made contiguous.
kernels::QuantizeActivationArgs describe_activation(const Tensor& contiguous,
                                                    const std::optional<Tensor>& scale) {
  const std::int64_t cols = contiguous.size(-1);
  return {.input = contiguous.const_data_ptr(),
          .static_scale = scale.has_value() ? scale->const_data_ptr<float>() : nullptr,
          .rows = c10::multiply_integers(contiguous.sizes().slice(0, contiguous.dim() - 1)),
          .cols = cols,
          .row_stride = cols,
          .input_dtype = dtype_of(contiguous.scalar_type())};
}

void run_activation(const Tensor& input, const kernels::QuantizeActivationArgs& args) {
  run_on(
      "quantize_activation", input.device(), [&] { kernels::cpu::quantize_activation(args); },
      [&](auto stream) { kernels::cuda::quantize_activation(args, stream); });
}

std::tuple<Tensor, Tensor> empty_quantized_activation(const Tensor& input,
                                                      const std::optional<Tensor>& scale) {
  c10::SymDimVector tokens(input.sym_sizes().begin(), input.sym_sizes().end());
  tokens.back() = 1;
  const Tensor codes = at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar));
  return {codes, scale.has_value() ? at::empty_like(*scale)
                                   : at::empty_symint(tokens, input.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& input,
                                               const std::optional<Tensor>& scale) {
  check_activation("quantize_activation", input, scale);
  const Tensor contiguous = input.contiguous();
  auto result = empty_quantized_activation(input, scale);
  auto& [codes, scales] = result;
  kernels::QuantizeActivationArgs args = describe_activation(contiguous, scale);
  args.codes = codes.mutable_data_ptr<std::int8_t>();
  args.scales = scale.has_value() ? nullptr : scales.mutable_data_ptr<float>();
  run_activation(contiguous, args);
  if (scale.has_value()) {
    scales.copy_(*scale);
  }
  return result;
}

std::tuple<Tensor, Tensor> quantize_activation_meta(const Tensor& input,
                                                    const std::optional<Tensor>& scale) {
  check_activation("quantize_activation", input, scale);
  return empty_quantized_activation(input, scale);
}

Tensor fake_quantize_activation(const Tensor& input, const std::optional<Tensor>& scale) {
  check_activation("fake_quantize_activation", input, scale);
  const Tensor contiguous = input.contiguous();
  Tensor output = at::empty_like(contiguous);
  kernels::QuantizeActivationArgs args = describe_activation(contiguous, scale);
  args.output = output.mutable_data_ptr();
  run_activation(contiguous, args);
  return output;
}

Tensor fake_quantize_activation_meta(const Tensor& input, const std::optional<Tensor>& scale) {
  check_activation("fake_quantize_activation", input, scale);
  return at::empty_symint(input.sym_sizes(), input.options().memory_format(c10::nullopt));
}

// ---------------------------------------------------------------------------------------- autograd

/// Straight-through estimator: the gradient passes unchanged, but for elements that a given scale
/// clamps, which get 0. The backward is made of differentiable operators.
class FakeQuantizeActivation : public torch::autograd::Function<FakeQuantizeActivation> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input,
                        const std::optional<Tensor>& scale) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moq::fake_quantize_activation", "")
                               .typed<decltype(fake_quantize_activation)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (scale.has_value()) {
      context->save_for_backward({input, *scale});
    }
    return op.call(input, scale);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    if (saved.empty()) {
      return {gradients[0], Tensor()};
    }
    constexpr double kQMax = 127.0;
    const Tensor positions = saved[0].detach().to(at::kFloat).mul(saved[1].detach().reciprocal());
    return {gradients[0].mul(positions.round().abs().le(kQMax)), Tensor()};
  }
};

Tensor fake_quantize_activation_autograd(const Tensor& input, const std::optional<Tensor>& scale) {
  return FakeQuantizeActivation::apply(input, scale);
}

std::tuple<Tensor, Tensor> quantize_activation_autograd(const Tensor& input,
                                                        const std::optional<Tensor>& scale) {
  return without_gradient<quantize_activation>("moq::quantize_activation", input, scale);
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
