#include "csrc/hessian/fisher.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <Eigen/Dense>
#include <cmath>
#include <utility>

#include "kernels/common/check.h"

namespace moq::hessian {

FisherOperator::FisherOperator(const at::Tensor& losses, std::vector<at::Tensor> parameters)
    : CurvatureOperator(std::move(parameters)), losses_(losses.reshape({-1})) {
  TORCH_CHECK_VALUE(losses.is_floating_point() && losses.dim() <= 1 && losses.numel() > 0,
                    "fisher: the losses must be one floating-point number per example, got shape ",
                    losses.sizes(), " of ", losses.scalar_type());
  TORCH_CHECK_VALUE(losses.requires_grad(),
                    "fisher: the losses must depend on parameters that require a gradient, got "
                    "some without a graph (are they detached, or computed under no_grad?)");
  require_leaves(this->parameters());
}

std::vector<at::Tensor> FisherOperator::gradient(std::int64_t example,
                                                 const std::vector<at::Tensor>& inputs) const {
  std::vector<at::Tensor> gradients =
      torch::autograd::grad({losses_.select(0, example)}, inputs, {}, /*retain_graph=*/true,
                            /*create_graph=*/false, /*allow_unused=*/true);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    if (!gradients[i].defined()) {
      gradients[i] = at::zeros_like(inputs[i]);
    }
  }
  return gradients;
}

std::vector<at::Tensor> FisherOperator::multiply(std::span<const std::int64_t> block,
                                                 const std::vector<at::Tensor>& vectors) const {
  const std::vector<at::Tensor> inputs = members(block);
  std::vector<at::Tensor> products;
  products.reserve(inputs.size());
  for (const at::Tensor& input : inputs) {
    products.push_back(at::zeros_like(input));
  }
  for (std::int64_t i = 0; i < examples(); ++i) {
    const std::vector<at::Tensor> gradients = gradient(i, inputs);
    double length = 0.0;  // g_i . v
    for (const double part : dots(gradients, vectors)) {
      length += part;
    }
    for (std::size_t p = 0; p < products.size(); ++p) {
      products[p].add_(gradients[p], length / static_cast<double>(examples()));
    }
  }
  return products;
}

std::vector<double> FisherOperator::traces(const Blocks& blocks, const Progress& progress) const {
  std::vector<std::int64_t> all;
  for (const std::vector<std::int64_t>& block : blocks) {
    all.insert(all.end(), block.begin(), block.end());
  }
  check_block(all);
  std::vector<double> traces(blocks.size());
  const std::vector<at::Tensor> inputs = members(all);
  for (std::int64_t i = 0; i < examples(); ++i) {
    const std::vector<at::Tensor> gradients = gradient(i, inputs);
    const std::vector<double> squares = dots(gradients, gradients);
    std::size_t position = 0;
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      for (std::size_t k = 0; k < blocks[b].size(); ++k, ++position) {
        traces[b] += squares[position] / static_cast<double>(examples());
      }
      MOQ_CHECK(std::isfinite(traces[b]), "trace: the gradients must be finite, got ", traces[b],
                " in block ", b, ": does the loss overflow in the parameters' dtype?");
    }
    if (progress) {
      progress(i + 1);
    }
  }
  return traces;
}

double FisherOperator::largest_eigenvalue(const std::vector<std::int64_t>& block,
                                          const Progress& progress) const {
  check_block(block);
  const std::vector<at::Tensor> inputs = members(block);
  std::vector<std::vector<at::Tensor>> gradients;
  Eigen::MatrixXd gram(examples(), examples());
  for (std::int64_t i = 0; i < examples(); ++i) {
    gradients.push_back(gradient(i, inputs));
    for (std::int64_t j = 0; j <= i; ++j) {
      double product = 0.0;
      for (const double part : dots(gradients.back(), gradients[static_cast<std::size_t>(j)])) {
        product += part;
      }
      MOQ_CHECK(std::isfinite(product), "eigenvalues: the gradients must be finite, got ", product,
                ": does the loss overflow in the parameters' dtype?");
      gram(i, j) = gram(j, i) = product / static_cast<double>(examples());
    }
    if (progress) {
      progress(i + 1);
    }
  }
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(gram, Eigen::EigenvaluesOnly);
  return solver.eigenvalues().maxCoeff();
}

}  // namespace moq::hessian
