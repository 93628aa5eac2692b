#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <vector>

/// For operators that write to their arguments.
namespace moq::ops {

/// The tensors that the schema says are written to.
inline std::vector<at::Tensor> written_arguments(const c10::OperatorHandle& op,
                                                 const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  const std::size_t first = stack.size() - arguments.size();
  std::vector<at::Tensor> written;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = stack[first + i];
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) {
      continue;
    }
    if (value.isTensor()) {
      written.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        written.push_back(tensor);
      }
    }
  }
  return written;
}

/// Kernel of the ADInplaceOrView key: autograd must see that values it may have saved are gone, as
/// after any in-place operation.
inline void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                          torch::jit::Stack* stack) {
  const std::vector<at::Tensor> written = written_arguments(op, *stack);
  {
    const at::AutoDispatchBelowADInplaceOrView below_in_place;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) {
    torch::autograd::impl::bump_version(tensor);
  }
}

}  // namespace moq::ops
