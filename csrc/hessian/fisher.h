#pragma once

#include <vector>

#include "csrc/hessian/curvature.h"
#include "csrc/hessian/sensitivity.h"

namespace moq::hessian {

/// The empirical Fisher matrix of n examples: the mean outer product of their gradients.
///
///   F = 1/n sum_i g_i g_i',  g_i = d losses[i] / d w
///
/// Needs first derivatives alone. It equals the Gauss-Newton matrix of a negative log likelihood
/// where the model's distribution is that of the labels, and can be far from it elsewhere.
/// Source: Kunstner, Balles, Hennig, Limitations of the empirical Fisher approximation, 2019,
/// eq. 3.
///
/// The graph of the losses lives as long as this object; used as HvpOperator.
class FisherOperator : public CurvatureOperator {
 public:
  /// @param losses      [n] or scalar (n = 1), the loss of each example
  /// @param parameters  as for HvpOperator
  /// @throws c10::ValueError if one is not of that kind.
  FisherOperator(const at::Tensor& losses, std::vector<at::Tensor> parameters);

  std::int64_t examples() const { return losses_.numel(); }

  /// Traces of diagonal blocks, exact: the mean squared lengths of the gradients in each block.
  /// One backward pass per example, which is what `progress` counts.
  /// @throws moq::Error naming a block with a number that is not finite.
  std::vector<double> traces(const Blocks& blocks, const Progress& progress = {}) const;

  /// The largest eigenvalue of one diagonal block, exact: that of the matrix of inner products
  /// g_i . g_j / n, which has the same spectrum but for zeros. One backward pass per example; holds
  /// n vectors of the block's size. @throws moq::Error if it is not finite.
  double largest_eigenvalue(const std::vector<std::int64_t>& block,
                            const Progress& progress = {}) const;

 protected:
  std::vector<at::Tensor> multiply(std::span<const std::int64_t> block,
                                   const std::vector<at::Tensor>& vectors) const override;

 private:
  /// The gradient of one example; zeros where its loss does not depend on a parameter.
  std::vector<at::Tensor> gradient(std::int64_t example,
                                   const std::vector<at::Tensor>& inputs) const;

  at::Tensor losses_;  ///< [n]
};

}  // namespace moq::hessian
