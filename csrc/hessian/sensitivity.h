#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "csrc/hessian/curvature.h"
#include "csrc/hessian/solvers/eigen_solvers.h"

/// Second-order sensitivity of blocks of parameters, from products with a matrix of curvature: the
/// Hessian or what stands for it, H below.
namespace moq::hessian {

/// Indices into CurvatureOperator::parameters(); blocks do not overlap.
using Blocks = std::vector<std::vector<std::int64_t>>;

/// Called after each product with the number of products made so far; may throw to stop.
using Progress = std::function<void(std::int64_t products)>;

struct TraceOptions {
  /// Stop when the standard error of every block's trace is at most this share of the largest
  /// |trace|; > 0.
  double tolerance = 0.1;
  std::int64_t min_products = 4;   ///< before a standard error is trusted, >= 2
  std::int64_t max_products = 16;  ///< >= min_products
  std::uint64_t seed = 0;
  std::uint32_t batch = 0;  ///< number of the batch, so that batches draw different vectors
  /// Asked after each product from the second on: true makes it the last, though the tolerance is
  /// not met. The same on all ranks of a sharded operator.
  std::function<bool()> enough = {};
  std::vector<std::string> names = {};  ///< of the blocks, for errors; empty: their numbers
};

/// samples[k][b] = z' H z over block b with the k-th random sign vector z: each an unbiased
/// estimate of the trace of that block of H.
struct TraceSamples {
  std::vector<std::vector<double>> samples;
  bool converged = false;  ///< the tolerance was met
};

/// Traces of all diagonal blocks of H from shared products (Hutchinson's estimator).
///
///   E[z_b' (H z)_b] = trace(H_bb)   for independent signs z, since signs of different elements
///                                   have mean product zero
///
/// One product serves all blocks. The signs are those of fill_rademacher(seed, index of the
/// parameter, k, batch), of whole parameters also where these are sharded. Sums are taken in
/// float64. Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
/// @throws moq::Error if an option is out of range, or naming a block whose product is not finite.
TraceSamples hutchinson_traces(const CurvatureOperator& hessian, const Blocks& blocks,
                               const TraceOptions& options, const Progress& progress = {});

/// Standard errors of the means over the rows of `samples` [products][blocks]; products >= 2.
std::vector<double> standard_errors(const std::vector<std::vector<double>>& samples);

/// Both ends of the spectrum of one diagonal block of H by Lanczos, in float64 if the parameters
/// are, else in float32. Options as in eigen_solvers.h, without vectors.
LanczosResult<double> block_eigenvalues(const CurvatureOperator& hessian,
                                        const std::vector<std::int64_t>& block,
                                        const EigenOptions& options, const Progress& progress = {});

}  // namespace moq::hessian
