// moq::foreach_adamw: what moq.AdamW does at a step, in one kernel call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/in_place.h"
#include "csrc/ops/quantizer.h"
#include "kernels/adamw.h"

namespace moq::ops {
namespace {

using at::Tensor;

constexpr const char* kName = "foreach_adamw";

// ---------------------------------------------------------------------------------------- checks

void check_scalar(const char* what, const std::optional<Tensor>& scalar, at::Device device) {
  if (scalar.has_value()) {
    check_type(kName, what, *scalar, at::kFloat);
    check_device(kName, what, *scalar, device);
    TORCH_CHECK_VALUE(scalar->sym_numel() == 1, kName, ": ", what,
                      " must have one element, got shape ", scalar->sym_sizes());
  }
}

void check(at::TensorList parameters, at::TensorList gradients, at::TensorList exp_avgs,
           at::TensorList exp_avg_sqs, at::TensorList steps, double beta1, double beta2,
           const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
           const std::optional<Tensor>& found_inf) {
  for (const at::TensorList& list : {gradients, exp_avgs, exp_avg_sqs, steps}) {
    TORCH_CHECK_VALUE(list.size() == parameters.size(), kName,
                      ": gradients, moments and steps must be one a parameter, got ", list.size(),
                      " for ", parameters.size());
  }
  for (const double beta : {beta1, beta2}) {
    TORCH_CHECK_VALUE(beta >= 0.0 && beta < 1.0, kName, ": betas must lie in [0, 1), got ", beta);
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    const Tensor& gradient = gradients[i];
    const at::Device device = parameters[0].device();
    check_float(kName, "parameters", parameter.scalar_type());
    check_device(kName, "parameters", parameter, device);
    TORCH_CHECK_VALUE(gradient.layout() == at::kStrided, kName, ": gradients must be dense, got ",
                      gradient.layout());
    check_float(kName, "gradients", gradient.scalar_type());
    TORCH_CHECK_TYPE(
        parameter.scalar_type() == at::kFloat || gradient.scalar_type() == parameter.scalar_type(),
        kName, ": the gradient of a ", name_of(parameter.scalar_type()),
        " parameter must have its dtype, got ", name_of(gradient.scalar_type()));
    check_device(kName, "gradients", gradient, device);
    check_sizes(kName, "gradients", gradient, parameter.sym_sizes());
    for (const Tensor& moment : {exp_avgs[i], exp_avg_sqs[i]}) {
      check_tensor(kName, "moments", moment, parameter.scalar_type(), device,
                   parameter.sym_sizes());
      TORCH_CHECK_VALUE(moment.sym_strides() == parameter.sym_strides(), kName,
                        ": moments must have their parameter's strides ", parameter.sym_strides(),
                        ", got ", moment.sym_strides());
    }
    check_scalar("steps", steps[i], device);
  }
  if (!parameters.empty()) {
    check_scalar("lr_tensor", lr_tensor, parameters[0].device());
    check_scalar("grad_scale", grad_scale, parameters[0].device());
    check_scalar("found_inf", found_inf, parameters[0].device());
  }
}

// --------------------------------------------------------------------------------- implementation

void foreach_adamw(at::TensorList parameters, at::TensorList gradients, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList steps, double lr, double beta1,
                   double beta2, double weight_decay, double eps, bool maximize,
                   const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  check(parameters, gradients, exp_avgs, exp_avg_sqs, steps, beta1, beta2, lr_tensor, grad_scale,
        found_inf);
  if (parameters.empty()) {
    return;
  }
  std::vector<kernels::AdamWTensor> tensors;
  std::vector<Tensor> copies;
  tensors.reserve(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    TORCH_CHECK_VALUE(parameter.is_non_overlapping_and_dense(), kName,
                      ": parameters must fill their memory without gaps, got shape ",
                      parameter.sizes(), " and strides ", parameter.strides());
    const Tensor* gradient = &gradients[i];
    if (gradient->strides() != parameter.strides()) {
      // Elements are numbered as they lie.
      copies.push_back(at::empty_like(parameter, gradient->options(), at::MemoryFormat::Preserve));
      gradient = &copies.back().copy_(*gradient);
    }
    tensors.push_back({.parameter = parameter.mutable_data_ptr(),
                       .gradient = gradient->const_data_ptr(),
                       .exp_avg = exp_avgs[i].mutable_data_ptr(),
                       .exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr(),
                       .step = steps[i].mutable_data_ptr<float>(),
                       .size = parameter.numel(),
                       .parameter_dtype = dtype_of(parameter.scalar_type()),
                       .gradient_dtype = dtype_of(gradient->scalar_type())});
  }
  const kernels::AdamWArgs args{.tensors = tensors,
                                .learning_rate = lr,
                                .learning_rate_tensor = data_or_null<float>(lr_tensor),
                                .beta1 = beta1,
                                .beta2 = beta2,
                                .weight_decay = weight_decay,
                                .epsilon = eps,
                                .maximize = maximize,
                                .grad_scale = data_or_null<float>(grad_scale),
                                .found_inf = data_or_null<float>(found_inf)};
  run_on(
      kName, parameters[0].device(), [&] { kernels::cpu::adamw(args); },
      [&](auto stream) { kernels::cuda::adamw(args, stream); });
}

void foreach_adamw_meta(at::TensorList parameters, at::TensorList gradients,
                        at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList steps,
                        double /*lr*/, double beta1, double beta2, double /*weight_decay*/,
                        double /*eps*/, bool /*maximize*/, const std::optional<Tensor>& lr_tensor,
                        const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf) {
  check(parameters, gradients, exp_avgs, exp_avg_sqs, steps, beta1, beta2, lr_tensor, grad_scale,
        found_inf);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, foreach_adamw);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, foreach_adamw);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, foreach_adamw_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, torch::CppFunction::makeFromBoxedFunction<without_gradient_in_place>());
}

TORCH_LIBRARY_IMPL(moq, ADInplaceOrView, m) {
  m.impl(kName, torch::CppFunction::makeFromBoxedFunction<bump_versions>());
}

}  // namespace moq::ops
