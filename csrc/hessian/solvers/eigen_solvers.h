#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/hessian/solvers/operator.h"

/// Extreme eigenvalues of a symmetric matrix of which only products are known.
/// Scalar (float or double) is the precision of the vectors; sums are taken in double.
namespace moq::hessian {

struct EigenOptions {
  int max_iterations = 30;  ///< products at most, >= 1
  double tolerance = 1e-2;  ///< relative residual of the dominant eigenpair, > 0
  std::uint64_t seed = 0;   ///< of the start vector
  bool vectors = false;     ///< also return the eigenvectors
  /// Asked by lanczos after each product from the second on: true makes it the last, though the
  /// tolerance is not met.
  std::function<bool()> enough = {};
};

/// An approximate eigenpair. At least one true eigenvalue lies within `residual` of `value`.
template <typename Scalar>
struct EigenPair {
  double value = 0.0;
  double residual = 0.0;       ///< |A v - value v| for the unit vector v
  std::vector<Scalar> vector;  ///< v, [n]; empty unless asked for
};

template <typename Scalar>
struct LanczosResult {
  EigenPair<Scalar> largest;   ///< most positive
  EigenPair<Scalar> smallest;  ///< most negative
  int iterations = 0;          ///< products made
  bool converged = false;      ///< of the dominant pair, see EigenOptions::tolerance; the other
                               ///< end is where its residual says
  std::vector<double> history = {};  ///< dominant().value after each product

  /// Of the two extremes the one of larger magnitude: |value| estimates the norm of A.
  const EigenPair<Scalar>& dominant() const {
    return largest.value >= -smallest.value ? largest : smallest;
  }
};

/// Both ends of the spectrum of A [n, n] by the Lanczos process with full reorthogonalisation.
///
/// Holds iterations + 1 vectors of n Scalars, its basis and one buffer; a product usually needs
/// another one to return. Vectors that are asked for come to that at the end. Stops as soon as the
/// dominant pair satisfies
///   residual <= tolerance |value|
/// and the other end cannot overtake it, or when the Krylov space is exhausted. The error of an
/// eigenvalue is at most the residual, and usually of the order of its square.
/// @throws moq::Error if n < 1, an option is out of range or A yields a number that is not finite.
template <typename Scalar>
LanczosResult<Scalar> lanczos(const Operator<Scalar>& product, std::int64_t n,
                              const EigenOptions& options = {});

template <typename Scalar>
struct PowerIterationResult {
  EigenPair<Scalar> dominant;  ///< of largest magnitude, with its sign
  int iterations = 0;
  bool converged = false;  ///< residual <= tolerance |value|
};

/// The dominant eigenpair by v <- A v / |A v|: the simple form, with three vectors. Its residual
/// falls by |lambda_2 / lambda_1| per product, and not at all when +lambda and -lambda are both
/// dominant.
/// @throws moq::Error as lanczos.
template <typename Scalar>
PowerIterationResult<Scalar> power_iteration(const Operator<Scalar>& product, std::int64_t n,
                                             const EigenOptions& options = {});

}  // namespace moq::hessian
