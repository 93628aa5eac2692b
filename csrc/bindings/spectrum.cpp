#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <utility>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "csrc/hessian/spectrum.h"

namespace moq::bindings {

namespace {

namespace py = pybind11;
using hessian::Estimate;
using hessian::SpectralQuadrature;

std::pair<double, double> as_pair(const Estimate& estimate) {
  return {estimate.value, estimate.standard_error};
}

}  // namespace

void bind_spectrum(py::module_& m) {
  py::class_<SpectralQuadrature>(
      m, "SpectralQuadrature",
      "The spectral measure of a symmetric matrix, of mass 1/n at each eigenvalue, as a mean of "
      "discrete rules (csrc/hessian/solvers/spectral_quadrature.h).")
      .def_readonly("n", &SpectralQuadrature::n)
      .def_readonly("products", &SpectralQuadrature::products)
      .def_readonly("exact", &SpectralQuadrature::exact)
      .def_property_readonly(
          "rules",
          [](const SpectralQuadrature& self) {
            std::vector<std::pair<std::vector<double>, std::vector<double>>> rules;
            for (const auto& rule : self.probes) {
              rules.emplace_back(rule.nodes, rule.weights);
            }
            return rules;
          },
          "(nodes, weights) of each probe.")
      .def(
          "trace",
          [](const SpectralQuadrature& self, int power) {
            return as_pair(trace_of(self, [power](double x) { return std::pow(x, power); }));
          },
          py::arg("power") = 1, "(value, standard error) of the trace of A^power.")
      .def(
          "density",
          [](const SpectralQuadrature& self, const std::vector<double>& values, double width) {
            std::vector<std::pair<double, double>> density;
            for (const Estimate& estimate : smooth_density(self, values, width)) {
              density.push_back(as_pair(estimate));
            }
            return density;
          },
          py::arg("values"), py::arg("width"),
          "(value, standard error) at each of `values` of the density blurred by a Gaussian of "
          "standard deviation `width`.");

  m.def(
      "lanczos",
      [](const hessian::FlatProduct& product, std::int64_t n, at::ScalarType dtype,
         int max_iterations, double tolerance, std::uint64_t seed) {
        hessian::LanczosResult<double> result;
        {
          const py::gil_scoped_release release;
          result = hessian::lanczos_of(
              product, n, dtype,
              {.max_iterations = max_iterations, .tolerance = tolerance, .seed = seed});
        }
        return py::dict(
            py::arg("largest") = result.largest.value, py::arg("smallest") = result.smallest.value,
            py::arg("dominant") = result.dominant().value,
            py::arg("residual") = result.dominant().residual,
            py::arg("iterations") = result.iterations, py::arg("converged") = result.converged,
            py::arg("history") = result.history);
      },
      py::arg("product"), py::arg("n"), py::kw_only(), py::arg("dtype"), py::arg("max_iterations"),
      py::arg("tolerance"), py::arg("seed"),
      "Both ends of the spectrum of A [n, n]: a dict as that of HvpOperator.eigenvalues, and "
      "history, the dominant value after each product. product(x) returns A x for x [n] of `dtype` "
      "on the CPU, which is valid during the call only.");

  m.def(
      "spectral_quadrature",
      [](const hessian::FlatProduct& product, std::int64_t n, at::ScalarType dtype, int steps,
         int probes, std::uint64_t seed) {
        const py::gil_scoped_release release;
        return hessian::spectral_quadrature_of(product, n, dtype,
                                               {.steps = steps, .probes = probes, .seed = seed});
      },
      py::arg("product"), py::arg("n"), py::kw_only(), py::arg("dtype"), py::arg("steps"),
      py::arg("probes"), py::arg("seed"),
      "Stochastic Lanczos quadrature of A [n, n]; product as for lanczos.");
}

}  // namespace moq::bindings
