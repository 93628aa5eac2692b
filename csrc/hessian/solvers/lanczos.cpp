// The Lanczos process (Paige 1972; Parlett, "The Symmetric Eigenvalue Problem", chapter 13).
//
// After j products the columns of V [n, j] are an orthonormal basis of the Krylov space of A and
// v_1, T [j, j] is tridiagonal with diagonal alpha and off-diagonal beta, and
//
//   A V = V T + beta_j v_(j+1) e_j'.
//
// An eigenpair (theta, s) of T, |s| = 1, gives the Ritz pair (theta, V s) of A. From the line above
//
//   |A V s - theta V s| = beta_j |s_j|,
//
// so that the residual costs nothing, and in exact arithmetic an eigenvalue of A lies that close.
// The relation survives rounding; the orthogonality of V does not, and with it go the Ritz values
// (copies of converged eigenvalues appear). Every new vector is therefore orthogonalised against
// all earlier ones, twice: "twice is enough" (Parlett, 6.9).
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <limits>
#include <vector>

#include "csrc/hessian/solvers/eigen_solvers.h"
#include "csrc/hessian/solvers/vectors.h"

namespace moq::hessian {

namespace {

/// alpha [j] and beta [j] as above; beta.back() belongs to v_(j+1).
struct Tridiagonal {
  std::vector<double> alpha;
  std::vector<double> beta;

  /// An upper bound of |T|, and so a scale for what counts as zero.
  double magnitude() const {
    double largest = 0.0;
    for (std::size_t i = 0; i < alpha.size(); ++i) {
      largest = std::max(largest, std::abs(alpha[i]) + (i > 0 ? beta[i - 1] : 0.0) + beta[i]);
    }
    return largest;
  }

  Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solve() const {
    const auto j = static_cast<Eigen::Index>(alpha.size());
    Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver;
    solver.computeFromTridiagonal(Eigen::Map<const Eigen::VectorXd>(alpha.data(), j),
                                  Eigen::Map<const Eigen::VectorXd>(beta.data(), j - 1));
    return solver;
  }
};

template <typename Scalar>
void orthogonalise(Vector<Scalar>& w, const std::vector<Vector<Scalar>>& basis) {
  for (int pass = 0; pass < 2; ++pass) {
    for (const Vector<Scalar>& v : basis) {
      w -= static_cast<Scalar>(dot(v, w)) * v;
    }
  }
}

template <typename Scalar>
EigenPair<Scalar> ritz_pair(const std::vector<Vector<Scalar>>& basis,
                            const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>& solver,
                            Eigen::Index which, double beta, bool with_vector) {
  const Eigen::VectorXd s = solver.eigenvectors().col(which);
  EigenPair<Scalar> pair{.value = solver.eigenvalues()[which],
                         .residual = beta * std::abs(s[s.size() - 1]),
                         .vector = {}};
  if (with_vector) {
    Vector<Scalar> v = Vector<Scalar>::Zero(basis.front().size());
    for (Eigen::Index i = 0; i < s.size(); ++i) {
      v += static_cast<Scalar>(s[i]) * basis[static_cast<std::size_t>(i)];
    }
    pair.vector.assign(v.data(), v.data() + v.size());
  }
  return pair;
}

/// True if the dominant pair is accurate enough and the other end of the spectrum, at its most
/// extreme, is no larger.
template <typename Scalar>
bool has_converged(const LanczosResult<Scalar>& result, double tolerance) {
  const EigenPair<Scalar>& first = result.dominant();
  const EigenPair<Scalar>& other = &first == &result.largest ? result.smallest : result.largest;
  const double magnitude = std::abs(first.value);
  return first.residual <= tolerance * magnitude &&
         std::abs(other.value) + other.residual <= (1.0 + tolerance) * magnitude;
}

}  // namespace

template <typename Scalar>
LanczosResult<Scalar> lanczos(const Operator<Scalar>& product, std::int64_t n,
                              const EigenOptions& options) {
  check_options("lanczos", n, options);
  Tridiagonal t;
  std::vector<Vector<Scalar>> basis = {start_vector<Scalar>(n, options.seed)};
  LanczosResult<Scalar> result;
  const auto max_iterations = static_cast<int>(std::min<std::int64_t>(options.max_iterations, n));
  Vector<Scalar> w(n);
  bool exhausted = false;
  while (result.iterations < max_iterations && !result.converged && !exhausted) {
    product(view(basis.back()), view(w));
    ++result.iterations;
    t.alpha.push_back(dot(basis.back(), w));
    MOQ_CHECK(std::isfinite(t.alpha.back()), "lanczos: the products must be finite, got ",
              t.alpha.back(), " in product ", result.iterations);
    orthogonalise(w, basis);
    t.beta.push_back(norm(w));
    // What is left after the basis has been taken out is rounding error: the basis spans an
    // invariant subspace, and its Ritz values are eigenvalues.
    exhausted = result.iterations == n ||
                t.beta.back() <= 8.0 * std::numeric_limits<Scalar>::epsilon() * t.magnitude();
    const auto solver = t.solve();
    const Eigen::Index last = solver.eigenvalues().size() - 1;
    const bool ends = exhausted || result.iterations == max_iterations;
    result.largest = ritz_pair(basis, solver, last, t.beta.back(), false);
    result.smallest = ritz_pair(basis, solver, 0, t.beta.back(), false);
    result.converged = exhausted || has_converged(result, options.tolerance);
    if (options.vectors && (ends || result.converged)) {
      result.largest = ritz_pair(basis, solver, last, t.beta.back(), true);
      result.smallest = ritz_pair(basis, solver, 0, t.beta.back(), true);
    }
    if (!ends && !result.converged) {
      basis.push_back(w * static_cast<Scalar>(1.0 / t.beta.back()));
    }
  }
  return result;
}

template LanczosResult<float> lanczos(const Operator<float>&, std::int64_t, const EigenOptions&);
template LanczosResult<double> lanczos(const Operator<double>&, std::int64_t, const EigenOptions&);

}  // namespace moq::hessian
