// moq::foreach_adamw: what moq.AdamW does at a step, in one kernel call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
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

/// Whether elements lie in the same order: strides of a dimension of one element mean nothing.
bool lies_alike(const Tensor& a, const Tensor& b) {
  for (std::int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.sym_size(dim) != 1 && a.sym_stride(dim) != b.sym_stride(dim)) {
      return a.sym_numel() == 0;
    }
  }
  return true;
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
    TORCH_CHECK_VALUE(parameter.is_non_overlapping_and_dense(), kName,
                      ": parameters must fill their memory without gaps, got shape ",
                      parameter.sym_sizes(), " and strides ", parameter.sym_strides());
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
      TORCH_CHECK_VALUE(lies_alike(moment, parameter), kName,
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

/// Where a tensor without gaps lies, and to which parameter it belongs.
struct Memory {
  std::uintptr_t begin;
  std::uintptr_t end;
  std::size_t index;
};

Memory memory_of(const Tensor& tensor, const void* data, std::size_t index = 0) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return {begin, begin + tensor.nbytes(), index};
}

/// What a step writes to, by address.
/// @throws ValueError (Python's) if something would be written twice, in an order nobody knows.
std::vector<Memory> written_memory(at::TensorList parameters, at::TensorList exp_avgs,
                                   at::TensorList exp_avg_sqs, at::TensorList steps) {
  std::vector<Memory> written;
  written.reserve(4 * parameters.size());
  for (const at::TensorList& list : {parameters, exp_avgs, exp_avg_sqs, steps}) {
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (list[i].numel() > 0) {
        written.push_back(memory_of(list[i], list[i].mutable_data_ptr(), i));
      }
    }
  }
  std::sort(written.begin(), written.end(),
            [](const Memory& a, const Memory& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < written.size(); ++i) {
    TORCH_CHECK_VALUE(
        written[i - 1].end <= written[i].begin, kName,
        ": parameters, moments and steps must not share memory, got those of tensors ",
        std::min(written[i - 1].index, written[i].index), " and ",
        std::max(written[i - 1].index, written[i].index), " that do; give each once, or clone one");
  }
  return written;
}

bool overlaps(const std::vector<Memory>& written, const Memory& memory) {
  const auto after =
      std::upper_bound(written.begin(), written.end(), memory.begin,
                       [](std::uintptr_t begin, const Memory& other) { return begin < other.end; });
  return memory.begin < memory.end && after != written.end() && after->begin < memory.end;
}

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
  const std::vector<Memory> written = written_memory(parameters, exp_avgs, exp_avg_sqs, steps);
  std::vector<kernels::AdamWTensor> tensors;
  std::vector<Tensor> copies;
  tensors.reserve(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    const Tensor* gradient = &gradients[i];
    if (!lies_alike(*gradient, parameter) ||
        overlaps(written, memory_of(*gradient, gradient->const_data_ptr()))) {
      // Elements are numbered as they lie, and gradients are those before the step.
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
