#pragma once

#include <functional>
#include <vector>

#include "csrc/hessian/curvature.h"

namespace moq::hessian {

/// The Hessian of a loss by central differences of its gradient: first derivatives alone, so
/// whatever trains can be measured.
///
///   H v = (g(w + h v) - g(w - h v)) / 2h + O(h²)
///   h   = c eps^(1/3) |g| / 2 |H v|,  at most eps^(1/3) |w| / |v|
///
/// with lengths over the block and eps the rounding error of the parameters' dtype. The gradient
/// changes by a share eps^(1/3), which balances truncation and rounding (Nocedal and Wright,
/// Numerical Optimization, 2nd edition, section 8.1, where the share is one of w): along sharp
/// directions, which Lanczos soon finds, a step that only follows |w| is far too long. |H v| is
/// that of the last product until this one shows another. The first product, and each in a
/// direction so much sharper or flatter that the step was sought anew, is made with h and 2h for
/// several c; the c whose two products agree best is kept.
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
    /// precision.
    bool check_all = false;
    /// What a previous operator over the same parameters found; the defaults find them.
    double scale = 1.0;  ///< c
    double rate = 0.0;   ///< |H v| / |g| |v|
  };

  FiniteDifferenceOperator(Gradient gradient, std::vector<at::Tensor> parameters, Options options,
                           Sharding sharding = {});

  /// From now on, also in the product that is being made, as Options::check_all says: for a loss
  /// that turns out to be evaluated in half precision.
  void check_all() { options_.check_all = true; }

  double scale() const { return scale_; }
  double rate() const { return rate_; }  ///< 0 before the first product

 protected:
  /// @return in float32, or float64 for parameters of that dtype
  /// @throws moq::Error if no two step sizes agree; whatever the gradient throws.
  std::vector<at::Tensor> multiply(std::span<const std::int64_t> block,
                                   const std::vector<at::Tensor>& vectors) const override;

 private:
  struct Difference {
    std::vector<at::Tensor> product = {};
    double step = 0.0;
    double length = 0.0;    ///< of the product
    double gradient = 0.0;  ///< length of the longer gradient

    /// Share of the gradient by which it changed.
    double change() const { return gradient > 0.0 ? 2.0 * step * length / gradient : 0.0; }
    double rate(double direction) const {
      return gradient > 0.0 ? length / (gradient * direction) : 0.0;
    }
  };

  Difference difference(std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors,
                        double step) const;
  /// The difference with the step for this direction, of length `direction`; sets `sought` if that
  /// of the last one would not do.
  Difference first_difference(std::span<const std::int64_t> block,
                              const std::vector<at::Tensor>& vectors, double direction,
                              bool* sought) const;
  double length(std::span<const std::int64_t> block, const std::vector<at::Tensor>& vectors) const;

  Gradient gradient_;
  Options options_;
  mutable double scale_;
  mutable double rate_;
};

}  // namespace moq::hessian
