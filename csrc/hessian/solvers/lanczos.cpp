// Ends of the spectrum from the Lanczos process (lanczos_process.h).
//
// An eigenpair (theta, s) of T, |s| = 1, gives the Ritz pair (theta, V s) of A. From
// A V = V T + beta_j v_(j+1) e_j' follows
//
//   |A V s - theta V s| = beta_j |s_j|,
//
// so that the residual costs nothing, and in exact arithmetic an eigenvalue of A lies that close.
#include <algorithm>

#include "csrc/hessian/solvers/eigen_solvers.h"
#include "csrc/hessian/solvers/lanczos_process.h"

namespace moq::hessian {

namespace {

template <typename Scalar>
EigenPair<Scalar> ritz_pair(const LanczosProcess<Scalar>& process, const TridiagonalSolver& solver,
                            Eigen::Index which, bool with_vector) {
  const Eigen::VectorXd s = solver.eigenvectors().col(which);
  EigenPair<Scalar> pair{.value = solver.eigenvalues()[which],
                         .residual = process.beta() * std::abs(s[s.size() - 1]),
                         .vector = {}};
  if (with_vector) {
    const Vector<Scalar> v = process.combine(s);
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
  LanczosProcess<Scalar> process(product, start_vector<Scalar>(n, options.seed), "lanczos");
  LanczosResult<Scalar> result;
  bool ends = false;
  while (!ends) {
    process.step();
    result.iterations = process.size();
    const TridiagonalSolver solver = process.solve();
    const Eigen::Index last = solver.eigenvalues().size() - 1;
    result.largest = ritz_pair(process, solver, last, false);
    result.smallest = ritz_pair(process, solver, 0, false);
    result.history.push_back(result.dominant().value);
    result.converged = process.exhausted() || has_converged(result, options.tolerance);
    ends = result.converged || result.iterations == options.max_iterations ||
           (result.iterations >= 2 && options.enough && options.enough());
    if (ends && options.vectors) {
      result.largest = ritz_pair(process, solver, last, true);
      result.smallest = ritz_pair(process, solver, 0, true);
    }
  }
  return result;
}

template LanczosResult<float> lanczos(const Operator<float>&, std::int64_t, const EigenOptions&);
template LanczosResult<double> lanczos(const Operator<double>&, std::int64_t, const EigenOptions&);

}  // namespace moq::hessian
