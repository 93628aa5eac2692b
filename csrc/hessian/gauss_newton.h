#pragma once

#include <vector>

#include "csrc/hessian/curvature.h"

namespace moq::hessian {

/// The generalised Gauss-Newton matrix of a loss L(z) of a model's outputs z(w).
///
///   G = J' H_L J     J = dz/dw,  H_L = d²L/dz²
///
/// The Hessian without the curvature of the model itself, sum_k dL/dz_k d²z_k/dw²; positive
/// semidefinite where L is convex in z, as squared errors and cross entropy of logits are. J v is
/// taken by differentiating the linear map u -> J' u, which needs the graph of one backward pass.
/// Source: Schraudolph, Fast Curvature Matrix-Vector Products, 2002.
///
/// Lives and must be used as HvpOperator.
class GaussNewtonOperator : public CurvatureOperator {
 public:
  /// @param loss        scalar of a floating type, computed from `outputs`
  /// @param outputs     z, of any shape, with a graph
  /// @param parameters  as for HvpOperator
  /// @throws c10::ValueError if one is not of that kind; c10::NotImplementedError as HvpOperator.
  GaussNewtonOperator(const at::Tensor& loss, const at::Tensor& outputs,
                      std::vector<at::Tensor> parameters);

 protected:
  std::vector<at::Tensor> multiply(std::span<const std::int64_t> block,
                                   const std::vector<at::Tensor>& vectors) const override;

 private:
  at::Tensor outputs_;
  at::Tensor output_gradient_;  ///< dL/dz, with its graph; without one where the loss is linear
  at::Tensor seed_;             ///< u, zeros: the map is linear in it
  std::vector<at::Tensor> pulled_back_;  ///< J' u, undefined where z does not depend on it
};

}  // namespace moq::hessian
