#include "csrc/hessian/hvp.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

#include "csrc/hessian/differentiable.h"

namespace moq::hessian {

HvpOperator::HvpOperator(const at::Tensor& loss, std::vector<at::Tensor> parameters)
    : parameters_(std::move(parameters)) {
  TORCH_CHECK_VALUE(loss.numel() == 1 && loss.is_floating_point(),
                    "Hessian: the loss must be one floating-point number, got shape ", loss.sizes(),
                    " of ", loss.scalar_type());
  TORCH_CHECK_VALUE(loss.requires_grad(),
                    "Hessian: the loss must depend on parameters that require a gradient, got one "
                    "without a graph (is it detached, or computed under no_grad?)");
  for (const at::Tensor& parameter : parameters_) {
    TORCH_CHECK_VALUE(
        parameter.is_leaf() && parameter.requires_grad(),
        "Hessian: parameters must be leaves that require a gradient, got one of shape ",
        parameter.sizes(), " that is not");
  }
  const GraphCheck check(loss);
  // The factor that the loss is scaled by requires a gradient, so that every gradient does that is
  // computed in a differentiable way, even where the loss is linear.
  const at::Tensor factor = at::ones_like(loss).requires_grad_();
  gradients_ = torch::autograd::grad({loss}, parameters_, {factor}, /*retain_graph=*/true,
                                     /*create_graph=*/true, /*allow_unused=*/true);
  check.throw_unless_differentiable(gradients_);
}

std::vector<at::Tensor> HvpOperator::product(std::span<const std::int64_t> block,
                                             const std::vector<at::Tensor>& vectors) const {
  TORCH_CHECK_VALUE(!block.empty() && block.size() == vectors.size(),
                    "Hessian: a product needs one vector per parameter of the block, got ",
                    vectors.size(), " for ", block.size());
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> gradients;
  std::vector<at::Tensor> directions;
  for (std::size_t i = 0; i < block.size(); ++i) {
    const auto index = static_cast<std::size_t>(block[i]);
    TORCH_CHECK_INDEX(index < parameters_.size(), "Hessian: a block must hold indices below ",
                      parameters_.size(), ", got ", block[i]);
    const at::Tensor& parameter = parameters_[index];
    TORCH_CHECK_VALUE(vectors[i].sizes() == parameter.sizes(),
                      "Hessian: a vector must have its parameter's shape ", parameter.sizes(),
                      ", got ", vectors[i].sizes());
    inputs.push_back(parameter);
    if (gradients_[index].defined() && gradients_[index].requires_grad()) {
      gradients.push_back(gradients_[index]);
      directions.push_back(vectors[i]);
    }
  }
  std::vector<at::Tensor> products(inputs.size());
  if (!gradients.empty()) {
    products = torch::autograd::grad(gradients, inputs, directions, /*retain_graph=*/true,
                                     /*create_graph=*/false, /*allow_unused=*/true);
  }
  for (std::size_t i = 0; i < products.size(); ++i) {
    if (!products[i].defined()) {
      products[i] = at::zeros_like(inputs[i]);
    }
  }
  return products;
}

}  // namespace moq::hessian
