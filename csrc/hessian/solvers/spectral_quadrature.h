#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "csrc/hessian/solvers/operator.h"

/// The spectral density of a symmetric matrix of which only products are known.
namespace moq::hessian {

struct QuadratureOptions {
  int steps = 40;          ///< products of a probe at most, >= 1: nodes of its rule
  int probes = 4;          ///< random start vectors, >= 2 so that there is a standard error
  std::uint64_t seed = 0;  ///< of the start vectors
};

/// A discrete measure on the real line: mass weights[i] at nodes[i].
struct QuadratureRule {
  std::vector<double> nodes;    ///< rising
  std::vector<double> weights;  ///< >= 0, of sum 1
};

/// The spectral measure of A [n, n], which has mass 1/n at each eigenvalue, as a mean of rules.
struct SpectralQuadrature {
  std::int64_t n = 0;
  std::vector<QuadratureRule> probes;  ///< independent, each without bias
  std::int64_t products = 0;           ///< made for all of them
  bool exact = false;                  ///< the only rule is the spectrum itself, every weight 1/n
};

/// Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019).
///
/// For a vector z of random signs, E[z' f(A) z] = trace f(A). With v_1 = z / sqrt(n) and the
/// eigenpairs (theta_i, s_i) of the tridiagonal matrix that m Lanczos steps from v_1 make,
///
///   z' f(A) z = n sum_i (s_i)_1^2 f(theta_i)     for polynomials f of degree up to 2 m - 1,
///
/// so that the theta_i with weights (s_i)_1^2 are a rule of one probe (Gauss quadrature; Golub and
/// Meurant, chapter 6). Its trace, and that of the square from m = 2 on, are Hutchinson's estimates
/// by z. Where n <= steps, products with the n unit vectors cost less than one probe, and give the
/// spectrum itself.
///
/// Holds steps + 1 vectors of n Scalars, as lanczos. The signs are those of fill_rademacher(seed,
/// probe).
/// @throws moq::Error if n < 1, an option is out of range or A yields a number that is not finite.
template <typename Scalar>
SpectralQuadrature spectral_quadrature(const Operator<Scalar>& product, std::int64_t n,
                                       const QuadratureOptions& options = {});

struct Estimate {
  double value = 0.0;
  double standard_error = 0.0;  ///< of the mean over the probes; 0 if the quadrature is exact
};

/// trace f(A), the sum of f over all eigenvalues.
Estimate trace_of(const SpectralQuadrature& quadrature, const std::function<double(double)>& f);

/// The density of eigenvalues, blurred by a Gaussian of standard deviation `width`:
///
///   density(x) = E[ sum_i weight_i exp(-(x - node_i)^2 / (2 width^2)) / (width sqrt(2 pi)) ],
///
/// the mean over the probes with its standard error, at each of `values`. Its integral is 1.
/// @throws moq::Error unless width > 0 and finite.
std::vector<Estimate> smooth_density(const SpectralQuadrature& quadrature,
                                     std::span<const double> values, double width);

}  // namespace moq::hessian
