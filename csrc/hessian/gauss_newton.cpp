#include "csrc/hessian/gauss_newton.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

#include "csrc/hessian/differentiable.h"

namespace moq::hessian {

namespace {

/// Gradients of outputs . weights, with zeros where there is no dependence.
std::vector<at::Tensor> pull_back(const std::vector<at::Tensor>& outputs,
                                  const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& weights) {
  std::vector<at::Tensor> gradients(inputs.size());
  if (!outputs.empty()) {
    gradients = torch::autograd::grad(outputs, inputs, weights, /*retain_graph=*/true,
                                      /*create_graph=*/false, /*allow_unused=*/true);
  }
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    if (!gradients[i].defined()) {
      gradients[i] = at::zeros_like(inputs[i]);
    }
  }
  return gradients;
}

}  // namespace

GaussNewtonOperator::GaussNewtonOperator(const at::Tensor& loss, const at::Tensor& outputs,
                                         std::vector<at::Tensor> parameters)
    : CurvatureOperator(std::move(parameters)), outputs_(outputs) {
  require_loss(loss);
  require_leaves(this->parameters());
  TORCH_CHECK_VALUE(outputs.is_floating_point() && outputs.requires_grad(),
                    "gauss_newton: the outputs must be floating-point with a graph, got ",
                    outputs.scalar_type(), outputs.requires_grad() ? "" : " without one");
  {
    const GraphCheck check(loss);
    const at::Tensor factor = at::ones_like(loss).requires_grad_();
    output_gradient_ = torch::autograd::grad({loss}, {outputs}, {factor}, /*retain_graph=*/true,
                                             /*create_graph=*/true, /*allow_unused=*/true)
                           .front();
    TORCH_CHECK_VALUE(output_gradient_.defined(),
                      "gauss_newton: the loss must be computed from the outputs that loss_fn "
                      "returns beside it, got outputs of shape ",
                      outputs.sizes(), " that it does not depend on");
    check.throw_unless_differentiable({output_gradient_});
  }
  const GraphCheck check(outputs);
  seed_ = at::zeros_like(outputs).requires_grad_();
  pulled_back_ = torch::autograd::grad({outputs}, this->parameters(), {seed_},
                                       /*retain_graph=*/true, /*create_graph=*/true,
                                       /*allow_unused=*/true);
  check.throw_unless_differentiable(pulled_back_);
}

std::vector<at::Tensor> GaussNewtonOperator::multiply(
    std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors) const {
  std::vector<at::Tensor> maps;
  std::vector<at::Tensor> directions;
  for (std::size_t i = 0; i < block.size(); ++i) {
    const at::Tensor& map = pulled_back_[static_cast<std::size_t>(block[i])];
    if (map.defined() && map.requires_grad()) {
      maps.push_back(map);
      directions.push_back(vectors[i]);
    }
  }
  const at::Tensor pushed = pull_back(maps, {seed_}, directions).front();  // J v
  const bool curved = output_gradient_.requires_grad();
  const at::Tensor weighted =
      curved ? pull_back({output_gradient_}, {outputs_}, {pushed}).front() : at::zeros_like(pushed);
  return pull_back({outputs_}, members(block), {weighted});
}

}  // namespace moq::hessian
