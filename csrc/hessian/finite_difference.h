#pragma once

#include <functional>
#include <vector>

#include "csrc/hessian/curvature.h"

namespace moq::hessian {

/// The Hessian of a loss by central differences of its gradient: first derivatives alone, so
/// whatever trains can be measured.
///
///   H v = (g(w + h v) - g(w - h v)) / 2h + O(h²)
///   h   = c eps^(1/3) |w| / |v|
///
/// with |w| and |v| over the block, eps the rounding error of the parameters' dtype: the step
/// balances truncation and rounding (Nocedal and Wright, Numerical Optimization, 2nd edition,
/// section 8.1), and follows each direction's length. The first product is made with h and 2h for
/// several c; the c is kept whose two products agree best.
///
/// While a product is made, the parameters' memory holds the perturbed values; afterwards the
/// former ones, bit for bit, also when the gradient throws.
class FiniteDifferenceOperator : public CurvatureOperator {
 public:
  /// The gradient of the loss in the parameters with the indices `block`, at the values that the
  /// parameters have now: pieces, if the operator is sharded. Undefined means zero.
  using Gradient = std::function<std::vector<at::Tensor>(const std::vector<std::int64_t>& block)>;

  struct Options {
    /// Two step sizes must agree to this share of the longer product, > 0.
    double agreement = 0.1;
    /// Compare two step sizes in every product, as is needed where the loss is evaluated in half
    /// precision, and not only in the first.
    bool check_all = false;
    /// The c that a previous operator over the same parameters found; 0 finds it.
    double scale = 0.0;
  };

  FiniteDifferenceOperator(Gradient gradient, std::vector<at::Tensor> parameters, Options options,
                           Sharding sharding = {});

  /// The c of the step, 0 before the first product.
  double scale() const { return scale_; }

 protected:
  /// @return in float32, or float64 for parameters of that dtype
  /// @throws moq::Error if no two step sizes agree; whatever the gradient throws.
  std::vector<at::Tensor> multiply(std::span<const std::int64_t> block,
                                   const std::vector<at::Tensor>& vectors) const override;

 private:
  std::vector<at::Tensor> difference(std::span<const std::int64_t> block,
                                     const std::vector<at::Tensor>& vectors, double step,
                                     double* noise) const;
  double length(std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors) const;

  Gradient gradient_;
  Options options_;
  mutable double scale_;  ///< found by the first product
};

}  // namespace moq::hessian
