#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <string>
#include <vector>

/// For operators that write to their arguments.
namespace moq::ops {

/// An argument that the schema says is written to: a tensor, or each tensor of a list.
struct WrittenArgument {
  const std::string& name;
  std::vector<at::Tensor> tensors;
};

inline std::vector<WrittenArgument> written_arguments(const c10::OperatorHandle& op,
                                                      const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  const std::size_t first = stack.size() - arguments.size();
  std::vector<WrittenArgument> written;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = stack[first + i];
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) {
      continue;
    }
    if (value.isTensor()) {
      written.push_back({arguments[i].name(), {value.toTensor()}});
    } else if (value.isTensorList()) {
      written.push_back({arguments[i].name(), value.toTensorVector()});
    }
  }
  return written;
}

/// Kernel of the Autograd key of an operator without a gradient: it must not write over a tensor
/// that is to get one.
inline void without_gradient_in_place(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                      torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    for (const WrittenArgument& argument : written_arguments(op, *stack)) {
      for (std::size_t i = 0; i < argument.tensors.size(); ++i) {
        TORCH_CHECK_VALUE(!argument.tensors[i].requires_grad(), op.schema().name().substr(5), ": ",
                          argument.name, " must not require a gradient, got tensor ", i,
                          " that does; call under torch.no_grad()");
      }
    }
  }
  const at::AutoDispatchBelowAutograd below_autograd;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

/// Kernel of the ADInplaceOrView key: autograd must see that values it may have saved are gone, as
/// after any in-place operation.
inline void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                          torch::jit::Stack* stack) {
  const std::vector<WrittenArgument> written = written_arguments(op, *stack);
  {
    const at::AutoDispatchBelowADInplaceOrView below_in_place;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const WrittenArgument& argument : written) {
    for (const at::Tensor& tensor : argument.tensors) {
      torch::autograd::impl::bump_version(tensor);
    }
  }
}

}  // namespace moq::ops
