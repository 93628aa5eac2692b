#pragma once

#include <Eigen/Dense>
#include <algorithm>
#include <random>
#include <span>
#include <vector>

#include "csrc/hessian/solvers/operator.h"

/// Matrices whose spectrum is known, for the tests of what only sees their products.
namespace moq::hessian {

template <typename Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;
template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

template <typename Scalar>
Operator<Scalar> product_with(const Matrix<Scalar>& a) {
  return [&a](std::span<const Scalar> x, std::span<Scalar> y) {
    Eigen::Map<Vector<Scalar>>(y.data(), a.rows()) =
        a * Eigen::Map<const Vector<Scalar>>(x.data(), a.cols());
  };
}

/// Q diag(spectrum) Q' with a random rotation Q.
template <typename Scalar>
Matrix<Scalar> matrix_with(const std::vector<double>& spectrum) {
  const auto n = static_cast<Eigen::Index>(spectrum.size());
  std::mt19937_64 generator(17);
  std::normal_distribution<double> normal;
  const Matrix<double> random =
      Matrix<double>::NullaryExpr(n, n, [&] { return normal(generator); });
  const Matrix<double> q = Eigen::HouseholderQR<Matrix<double>>(random).householderQ();
  const auto diagonal = Eigen::Map<const Vector<double>>(spectrum.data(), n).asDiagonal();
  return (q * diagonal * q.transpose()).template cast<Scalar>();
}

inline std::vector<double> evenly(double low, double high, int count) {
  std::vector<double> values;
  for (int i = 0; i < count; ++i) {
    values.push_back(low + (high - low) * i / std::max(1, count - 1));
  }
  return values;
}

inline std::vector<double> operator+(std::vector<double> a, const std::vector<double>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace moq::hessian
