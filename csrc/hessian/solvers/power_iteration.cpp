// v <- A v / |A v|. With lambda = v' A v the residual is |A v - lambda v|, and the part of v
// outside the dominant eigenspace shrinks by |lambda_2 / lambda_1| per product.
#include "csrc/hessian/solvers/eigen_solvers.h"
#include "csrc/hessian/solvers/vectors.h"

namespace moq::hessian {

template <typename Scalar>
PowerIterationResult<Scalar> power_iteration(const Operator<Scalar>& product, std::int64_t n,
                                             const EigenOptions& options) {
  check_options("power_iteration", n, options);
  Vector<Scalar> v = start_vector<Scalar>(n, options.seed);
  Vector<Scalar> w(n);
  PowerIterationResult<Scalar> result;
  EigenPair<Scalar>& pair = result.dominant;
  while (true) {
    product(view(v), view(w));
    ++result.iterations;
    pair.value = dot(v, w);
    const double length = norm(w);
    MOQ_CHECK(std::isfinite(length), "power_iteration: the products must be finite, got ", length,
              " in product ", result.iterations);
    const Vector<Scalar> difference = w - static_cast<Scalar>(pair.value) * v;
    pair.residual = norm(difference);
    result.converged = pair.residual <= options.tolerance * std::abs(pair.value);
    if (result.converged || result.iterations == options.max_iterations) {
      break;
    }
    v = w * static_cast<Scalar>(1.0 / length);
  }
  if (options.vectors) {
    pair.vector.assign(v.data(), v.data() + v.size());
  }
  return result;
}

template PowerIterationResult<float> power_iteration(const Operator<float>&, std::int64_t,
                                                     const EigenOptions&);
template PowerIterationResult<double> power_iteration(const Operator<double>&, std::int64_t,
                                                      const EigenOptions&);

}  // namespace moq::hessian
