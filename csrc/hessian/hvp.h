#pragma once

#include <vector>

#include "csrc/hessian/curvature.h"

namespace moq::hessian {

/// The Hessian H of a scalar loss, exact, by differentiating the gradient again.
///
///   g(w) = d loss / d w        built once, with its graph
///   H v  = d (g . v) / d w     one backward pass over that graph for each v
///
/// Source: Pearlmutter, Fast Exact Multiplication by the Hessian, 1994, in reverse mode.
///
/// The graph of the loss and of the gradient lives as long as this object. The gradients that the
/// parameters hold (`.grad`) are neither read nor written.
/// Must be constructed and used without Python's global lock: nodes of the graph may take it.
class HvpOperator : public CurvatureOperator {
 public:
  /// @param loss        scalar of a floating type, with a graph
  /// @param parameters  leaves that require a gradient; one that the loss does not depend on has
  ///     zero curvature
  /// @throws c10::ValueError if the loss or a parameter is not of that kind;
  ///     c10::NotImplementedError if an operation in the graph cannot be differentiated twice,
  ///     naming it.
  HvpOperator(const at::Tensor& loss, std::vector<at::Tensor> parameters);

 protected:
  std::vector<at::Tensor> multiply(std::span<const std::int64_t> block,
                                   const std::vector<at::Tensor>& vectors) const override;

 private:
  /// Undefined where the loss does not depend on the parameter; without a graph where the
  /// dependence is piecewise constant (torch.floor).
  std::vector<at::Tensor> gradients_;
};

}  // namespace moq::hessian
