#include "csrc/hessian/hvp.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

#include "csrc/hessian/differentiable.h"

namespace moq::hessian {

HvpOperator::HvpOperator(const at::Tensor& loss, std::vector<at::Tensor> parameters)
    : CurvatureOperator(std::move(parameters)) {
  require_loss(loss);
  require_leaves(this->parameters());
  const GraphCheck check(loss);
  // The factor that the loss is scaled by requires a gradient, so that every gradient does that is
  // computed in a differentiable way, even where the loss is linear.
  const at::Tensor factor = at::ones_like(loss).requires_grad_();
  gradients_ = torch::autograd::grad({loss}, this->parameters(), {factor}, /*retain_graph=*/true,
                                     /*create_graph=*/true, /*allow_unused=*/true);
  check.throw_unless_differentiable(gradients_);
}

std::vector<at::Tensor> HvpOperator::multiply(std::span<const std::int64_t> block,
                                              const std::vector<at::Tensor>& vectors) const {
  const std::vector<at::Tensor> inputs = members(block);
  std::vector<at::Tensor> gradients;
  std::vector<at::Tensor> directions;
  for (std::size_t i = 0; i < block.size(); ++i) {
    const at::Tensor& gradient = gradients_[static_cast<std::size_t>(block[i])];
    if (gradient.defined() && gradient.requires_grad()) {
      gradients.push_back(gradient);
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
