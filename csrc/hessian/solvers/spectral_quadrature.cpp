#include "csrc/hessian/solvers/spectral_quadrature.h"

#include <numbers>

#include "csrc/hessian/solvers/lanczos_process.h"

namespace moq::hessian {

namespace {

constexpr auto* kWhere = "spectral_quadrature";

std::vector<double> to_vector(const Eigen::VectorXd& x) {
  return {x.data(), x.data() + x.size()};
}

template <typename Scalar>
QuadratureRule rule_of_probe(const Operator<Scalar>& product, std::int64_t n, int steps,
                             const RandomStream& stream, std::int64_t& products) {
  Vector<Scalar> start(n);
  fill_rademacher(view(start), stream);
  start *= static_cast<Scalar>(1.0 / std::sqrt(static_cast<double>(n)));
  LanczosProcess<Scalar> process(product, std::move(start), kWhere);
  do {
    process.step();
  } while (process.size() < steps && !process.exhausted());
  products += process.size();
  const TridiagonalSolver solver = process.solve();
  return {.nodes = to_vector(solver.eigenvalues()),
          .weights = to_vector(solver.eigenvectors().row(0).cwiseAbs2())};
}

/// The spectrum of A from its columns.
template <typename Scalar>
QuadratureRule whole_spectrum(const Operator<Scalar>& product, std::int64_t n) {
  Eigen::MatrixXd a(n, n);
  Vector<Scalar> column(n);
  for (Eigen::Index i = 0; i < n; ++i) {
    Vector<Scalar> unit = Vector<Scalar>::Unit(n, i);
    product(view(std::as_const(unit)), view(column));
    a.col(i) = column.template cast<double>();
    MOQ_CHECK(a.col(i).allFinite(), kWhere, ": the products must be finite, got ", a.col(i).sum(),
              " as the sum of product ", i + 1);
  }
  const TridiagonalSolver solver((a + a.transpose()) / 2.0, Eigen::EigenvaluesOnly);
  return {
      .nodes = to_vector(solver.eigenvalues()),
      .weights = std::vector<double>(static_cast<std::size_t>(n), 1.0 / static_cast<double>(n))};
}

Estimate mean_of(const std::vector<double>& values) {
  const auto count = static_cast<double>(values.size());
  double sum = 0.0;
  for (const double value : values) {
    sum += value;
  }
  const double mean = sum / count;
  double squares = 0.0;
  for (const double value : values) {
    squares += (value - mean) * (value - mean);
  }
  return {.value = mean,
          .standard_error =
              values.size() > 1 ? std::sqrt(squares / (count - 1.0) / count) : 0.0};  // exact
}

/// The mean over the probes of sum_i weight_i f(node_i).
template <typename Function>
Estimate integral(const SpectralQuadrature& quadrature, const Function& f) {
  std::vector<double> values;
  values.reserve(quadrature.probes.size());
  for (const QuadratureRule& rule : quadrature.probes) {
    double sum = 0.0;
    for (std::size_t i = 0; i < rule.nodes.size(); ++i) {
      sum += rule.weights[i] * f(rule.nodes[i]);
    }
    values.push_back(sum);
  }
  return mean_of(values);
}

}  // namespace

template <typename Scalar>
SpectralQuadrature spectral_quadrature(const Operator<Scalar>& product, std::int64_t n,
                                       const QuadratureOptions& options) {
  MOQ_CHECK(n >= 1, kWhere, ": the matrix must have at least one row, got ", n);
  MOQ_CHECK(options.steps >= 1, kWhere, ": steps must be >= 1, got ", options.steps);
  MOQ_CHECK(options.probes >= 2, kWhere, ": probes must be >= 2, got ", options.probes);
  SpectralQuadrature result{.n = n, .probes = {}, .exact = n <= options.steps};
  if (result.exact) {
    result.probes.push_back(whole_spectrum(product, n));
    result.products = n;
    return result;
  }
  for (int probe = 0; probe < options.probes; ++probe) {
    const RandomStream stream{.seed = options.seed, .probe = static_cast<std::uint32_t>(probe)};
    result.probes.push_back(rule_of_probe(product, n, options.steps, stream, result.products));
  }
  return result;
}

Estimate trace_of(const SpectralQuadrature& quadrature, const std::function<double(double)>& f) {
  const Estimate mean = integral(quadrature, f);
  const auto n = static_cast<double>(quadrature.n);
  return {.value = n * mean.value, .standard_error = n * mean.standard_error};
}

std::vector<Estimate> smooth_density(const SpectralQuadrature& quadrature,
                                     std::span<const double> values, double width) {
  MOQ_CHECK(width > 0.0 && std::isfinite(width),
            "smooth_density: width must be positive and finite, got ", width);
  const double peak = 1.0 / (width * std::sqrt(2.0 * std::numbers::pi));
  std::vector<Estimate> density;
  density.reserve(values.size());
  for (const double x : values) {
    density.push_back(integral(quadrature, [&](double node) {
      const double distance = (x - node) / width;
      return peak * std::exp(-0.5 * distance * distance);
    }));
  }
  return density;
}

template SpectralQuadrature spectral_quadrature(const Operator<float>&, std::int64_t,
                                                const QuadratureOptions&);
template SpectralQuadrature spectral_quadrature(const Operator<double>&, std::int64_t,
                                                const QuadratureOptions&);

}  // namespace moq::hessian
