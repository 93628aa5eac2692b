// moq::norm: layer and root-mean-square normalisation.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/linear_call.h"
#include "csrc/ops/quantizer.h"
#include "kernels/norm.h"

namespace moq::ops {
namespace {

using at::Tensor;
using kernels::NormKind;

constexpr const char* kName = "norm";

NormKind check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               std::string_view norm) {
  check_activations(kName, "input", input);
  TORCH_CHECK_VALUE(input.dim() == 2, kName, ": input must be [num_tokens, hidden_size], got ",
                    input.dim(), " dimensions");
  const NormKind kind = parse_norm(kName, norm);
  const SymSizes<1> columns{input.sym_size(1)};
  check_tensor(kName, "weight", weight, at::kFloat, input.device(), columns);
  TORCH_CHECK_VALUE(kind == NormKind::kLayerNorm || !bias.has_value(), kName,
                    ": bias must not come with rms_norm, got one");
  check_tensor(kName, "bias", bias, at::kFloat, input.device(), columns);
  return kind;
}

Tensor norm(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
            std::string_view name, double epsilon) {
  const NormKind kind = check(input, weight, bias, name);
  const Tensor rows = with_whole_rows(input);
  const Tensor whole_weight = weight.contiguous();
  const std::optional<Tensor> whole_bias = contiguous(bias);
  Tensor output = at::empty(input.sizes(), input.options());
  run_on(
      kName, input.device(),
      [&] {
        const Tensor packed_rows = rows.contiguous();
        normalise_on_cpu(kind, packed_rows, whole_weight, whole_bias, epsilon, output);
      },
      [&](auto stream) {
        kernels::cuda::norm({.input = rows.const_data_ptr(),
                             .input_stride = rows.stride(0),
                             .norm = {.kind = kind,
                                      .weight = whole_weight.const_data_ptr<float>(),
                                      .bias = data_or_null<float>(whole_bias),
                                      .epsilon = static_cast<float>(epsilon)},
                             .output = output.mutable_data_ptr(),
                             .output_stride = output.size(1),
                             .num_tokens = rows.size(0),
                             .hidden_size = rows.size(1),
                             .dtype = dtype_of(rows.scalar_type())},
                            stream);
      });
  return output;
}

Tensor norm_meta(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 std::string_view name, double /*epsilon*/) {
  check(input, weight, bias, name);
  return at::empty_symint(input.sym_sizes(), input.options());
}

}  // namespace

void normalise_on_cpu(NormKind kind, const Tensor& input, const Tensor& weight,
                      const std::optional<Tensor>& bias, double epsilon, const Tensor& output) {
  if (kind == NormKind::kLayerNorm) {
    kernels::cpu::layer_norm({.input = input.const_data_ptr<float>(),
                              .weight = weight.const_data_ptr<float>(),
                              .bias = data_or_null<float>(bias),
                              .output = output.mutable_data_ptr<float>(),
                              .num_tokens = input.size(0),
                              .hidden_size = input.size(1),
                              .epsilon = static_cast<float>(epsilon)});
  } else {
    kernels::cpu::rms_norm({.input = input.const_data_ptr<float>(),
                            .weight = weight.const_data_ptr<float>(),
                            .output = output.mutable_data_ptr<float>(),
                            .num_tokens = input.size(0),
                            .hidden_size = input.size(1),
                            .epsilon = static_cast<float>(epsilon)});
  }
}

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, norm);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, norm);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, norm_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq::ops
