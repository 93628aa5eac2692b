#include "csrc/hessian/curvature.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

namespace moq::hessian {

CurvatureOperator::CurvatureOperator(std::vector<at::Tensor> parameters, Sharding sharding)
    : parameters_(std::move(parameters)), sharding_(std::move(sharding)) {
  TORCH_CHECK_VALUE(sharding_.pieces.empty() || sharding_.pieces.size() == parameters_.size(),
                    "curvature: a sharding needs one piece per parameter, got ",
                    sharding_.pieces.size(), " for ", parameters_.size());
}

std::vector<at::Tensor> CurvatureOperator::product(std::span<const std::int64_t> block,
                                                   const std::vector<at::Tensor>& vectors) const {
  check_block(block);
  TORCH_CHECK_VALUE(block.size() == vectors.size(),
                    "curvature: a product needs one vector per parameter of the block, got ",
                    vectors.size(), " for ", block.size());
  for (std::size_t i = 0; i < block.size(); ++i) {
    const auto index = static_cast<std::size_t>(block[i]);
    TORCH_CHECK_VALUE(vectors[i].sizes() == parameters_[index].sizes(),
                      "curvature: a vector must have its parameter's shape ",
                      parameters_[index].sizes(), ", got ", vectors[i].sizes());
  }
  return multiply(block, vectors);
}

void CurvatureOperator::check_block(std::span<const std::int64_t> block) const {
  TORCH_CHECK_VALUE(!block.empty(), "curvature: a block must hold a parameter, got none");
  for (const std::int64_t index : block) {
    TORCH_CHECK_INDEX(index >= 0 && index < std::ssize(parameters_),
                      "curvature: a block must hold indices from 0 to ",
                      std::ssize(parameters_) - 1, ", got ", index);
  }
}

std::vector<at::Tensor> CurvatureOperator::members(std::span<const std::int64_t> block) const {
  std::vector<at::Tensor> members;
  members.reserve(block.size());
  for (const std::int64_t index : block) {
    members.push_back(parameters_[static_cast<std::size_t>(index)]);
  }
  return members;
}

std::vector<std::int64_t> CurvatureOperator::sizes(std::int64_t index) const {
  const auto i = static_cast<std::size_t>(index);
  return sharding_.pieces.empty() ? parameters_.at(i).sizes().vec() : sharding_.pieces.at(i).whole;
}

std::int64_t CurvatureOperator::numel(std::int64_t index) const {
  const std::vector<std::int64_t> shape = sizes(index);
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

at::Tensor CurvatureOperator::cut(std::int64_t index, const at::Tensor& whole) const {
  if (sharding_.pieces.empty()) {
    return whole;
  }
  const auto i = static_cast<std::size_t>(index);
  at::Tensor piece = whole;
  for (std::int64_t dim = 0; dim < whole.dim(); ++dim) {
    const std::int64_t begin = sharding_.pieces[i].offset[static_cast<std::size_t>(dim)];
    const std::int64_t length = parameters_[i].size(dim);
    // A rank without elements may begin beyond the end.
    piece = piece.narrow(dim, std::min(begin, piece.size(dim) - length), length);
  }
  return piece;
}

at::Tensor CurvatureOperator::join(std::int64_t index, const at::Tensor& piece) const {
  return sharding_.pieces.empty() ? piece : sharding_.join(index, piece);
}

std::vector<double> CurvatureOperator::sum(std::span<const std::int64_t> block,
                                           const std::vector<double>& values) const {
  return sharding_.pieces.empty() ? values : sharding_.sum({block.begin(), block.end()}, values);
}

std::vector<double> dots(const std::vector<at::Tensor>& x, const std::vector<at::Tensor>& y) {
  // Squares of half-precision numbers underflow in half precision.
  const auto wide = [](const at::Tensor& t) {
    return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
  };
  std::vector<at::Tensor> sums;
  sums.reserve(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    sums.push_back(at::sum(at::mul(wide(x[i]), wide(y[i])), at::kDouble));
  }
  std::vector<double> values;
  values.reserve(x.size());
  for (const at::Tensor& sum : sums) {
    values.push_back(sum.item<double>());
  }
  return values;
}

void require_loss(const at::Tensor& loss) {
  TORCH_CHECK_VALUE(loss.numel() == 1 && loss.is_floating_point(),
                    "curvature: the loss must be one floating-point number, got shape ",
                    loss.sizes(), " of ", loss.scalar_type());
  TORCH_CHECK_VALUE(loss.requires_grad(),
                    "curvature: the loss must depend on parameters that require a gradient, got "
                    "one without a graph (is it detached, or computed under no_grad?)");
}

void require_leaves(const std::vector<at::Tensor>& parameters) {
  for (const at::Tensor& parameter : parameters) {
    TORCH_CHECK_VALUE(
        parameter.is_leaf() && parameter.requires_grad(),
        "curvature: parameters must be leaves that require a gradient, got one of shape ",
        parameter.sizes(), " that is not");
  }
}

}  // namespace moq::hessian
