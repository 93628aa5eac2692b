#pragma once

#include <Eigen/Core>
#include <cmath>
#include <span>

#include "csrc/hessian/solvers/eigen_solvers.h"
#include "csrc/hessian/solvers/random.h"
#include "kernels/common/check.h"

/// What the eigen-solvers share.
namespace moq::hessian {

template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

template <typename Scalar>
double dot(const Vector<Scalar>& x, const Vector<Scalar>& y) {
  return x.template cast<double>().dot(y.template cast<double>());
}

template <typename Scalar>
double norm(const Vector<Scalar>& x) {
  return std::sqrt(dot(x, x));
}

template <typename Scalar>
std::span<Scalar> view(Vector<Scalar>& x) {
  return {x.data(), static_cast<std::size_t>(x.size())};
}

template <typename Scalar>
std::span<const Scalar> view(const Vector<Scalar>& x) {
  return {x.data(), static_cast<std::size_t>(x.size())};
}

inline void check_options(const char* where, std::int64_t n, const EigenOptions& options) {
  MOQ_CHECK(n >= 1, where, ": the matrix must have at least one row, got ", n);
  MOQ_CHECK(options.max_iterations >= 1, where, ": max_iterations must be >= 1, got ",
            options.max_iterations);
  MOQ_CHECK(options.tolerance > 0.0, where, ": tolerance must be > 0, got ", options.tolerance);
}

/// A random unit vector: it has a part in every eigenspace of any matrix with probability 1.
template <typename Scalar>
Vector<Scalar> start_vector(std::int64_t n, std::uint64_t seed) {
  Vector<Scalar> v(n);
  fill_uniform(view(v), RandomStream{.seed = seed});
  const double length = norm(v);
  if (length == 0.0) {  // n = 1 can draw a zero
    v.setOnes();
    return v;
  }
  return v * static_cast<Scalar>(1.0 / length);
}

}  // namespace moq::hessian
