#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "csrc/hessian/finite_difference.h"
#include "csrc/hessian/fisher.h"
#include "csrc/hessian/gauss_newton.h"
#include "csrc/hessian/hvp.h"
#include "csrc/hessian/sensitivity.h"

namespace moq::bindings {

namespace {

namespace py = pybind11;
using hessian::Blocks;
using hessian::CurvatureOperator;
using hessian::FiniteDifferenceOperator;
using hessian::FisherOperator;
using hessian::GaussNewtonOperator;
using hessian::HvpOperator;
using hessian::Progress;
using hessian::Sharding;

// Nodes of the graph that belong to Python take its lock themselves, so it is given up before
// graphs are built, used and freed.

/// The forms of an operator, each with its constructor.
void bind_operators(py::module_& m) {
  py::class_<HvpOperator, CurvatureOperator>(
      m, "HvpOperator",
      "The Hessian of a scalar loss in a list of parameters, as an exact product "
      "(csrc/hessian/hvp.h). Holds the graph of the loss until it is deleted.",
      py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const at::Tensor& loss, std::vector<at::Tensor> parameters) {
             const py::gil_scoped_release release;
             return std::make_unique<HvpOperator>(loss, std::move(parameters));
           }),
           py::arg("loss"), py::arg("parameters"),
           "Raises NotImplementedError, naming the operation, if the graph is not twice "
           "differentiable.");

  py::class_<GaussNewtonOperator, CurvatureOperator>(
      m, "GaussNewtonOperator",
      "The generalised Gauss-Newton matrix of a loss of a model's outputs "
      "(csrc/hessian/gauss_newton.h).",
      py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const at::Tensor& loss, const at::Tensor& outputs,
                       std::vector<at::Tensor> parameters) {
             const py::gil_scoped_release release;
             return std::make_unique<GaussNewtonOperator>(loss, outputs, std::move(parameters));
           }),
           py::arg("loss"), py::arg("outputs"), py::arg("parameters"),
           "Raises NotImplementedError as HvpOperator.");

  py::class_<FisherOperator, CurvatureOperator>(
      m, "FisherOperator",
      "The mean outer product of the gradients of examples (csrc/hessian/fisher.h).",
      py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const at::Tensor& losses, std::vector<at::Tensor> parameters) {
             const py::gil_scoped_release release;
             return std::make_unique<FisherOperator>(losses, std::move(parameters));
           }),
           py::arg("losses"), py::arg("parameters"))
      .def_property_readonly("examples", &FisherOperator::examples)
      .def(
          "exact_traces",
          [](const FisherOperator& self, const Blocks& blocks, const Progress& progress) {
            const py::gil_scoped_release release;
            return self.traces(blocks, progress);
          },
          py::arg("blocks"), py::kw_only(), py::arg("progress") = py::none(),
          "The trace of every block, from one backward pass per example.")
      .def(
          "largest_eigenvalue",
          [](const FisherOperator& self, const std::vector<std::int64_t>& block,
             const Progress& progress) {
            const py::gil_scoped_release release;
            return self.largest_eigenvalue(block, progress);
          },
          py::arg("block"), py::kw_only(), py::arg("progress") = py::none(),
          "The largest eigenvalue of one block, exact, from one backward pass per example.");

  py::class_<Sharding>(m, "Sharding",
                       "How the parameters of an operator are divided among ranks "
                       "(csrc/hessian/curvature.h).")
      .def(
          py::init(
              [](const std::vector<std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>>>&
                     pieces,
                 Sharding::Sum sum, Sharding::Join join) {
                Sharding sharding{.pieces = {}, .sum = std::move(sum), .join = std::move(join)};
                for (const auto& [whole, offset] : pieces) {
                  sharding.pieces.push_back({whole, offset});
                }
                return sharding;
              }),
          py::arg("pieces"), py::arg("sum"), py::arg("join"),
          "pieces: (shape of the whole, offset of this rank's part) of each parameter.");

  py::class_<FiniteDifferenceOperator, CurvatureOperator>(
      m, "FiniteDifferenceOperator",
      "The Hessian by central differences of gradients (csrc/hessian/finite_difference.h).",
      py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](FiniteDifferenceOperator::Gradient gradient,
                       std::vector<at::Tensor> parameters, bool check_all, double scale,
                       double rate, const Sharding* sharding) {
             return std::make_unique<FiniteDifferenceOperator>(
                 std::move(gradient), std::move(parameters),
                 FiniteDifferenceOperator::Options{
                     .check_all = check_all, .scale = scale, .rate = rate},
                 sharding == nullptr ? Sharding{} : *sharding);
           }),
           py::arg("gradient"), py::arg("parameters"), py::kw_only(), py::arg("check_all") = false,
           py::arg("scale") = 1.0, py::arg("rate") = 0.0, py::arg("sharding") = py::none(),
           "gradient(block) returns the gradients at the values that the parameters have now.")
      .def("check_all", &FiniteDifferenceOperator::check_all,
           "From now on, compares two step sizes in every product.")
      .def_property_readonly("scale", &FiniteDifferenceOperator::scale)
      .def_property_readonly("rate", &FiniteDifferenceOperator::rate);
}

}  // namespace

void bind_hessian(py::module_& m) {
  py::class_<CurvatureOperator>(
      m, "CurvatureOperator",
      "A symmetric matrix over a list of parameters, as a product (csrc/hessian/curvature.h).",
      py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("parameters", &CurvatureOperator::parameters)
      .def(
          "product",
          [](const CurvatureOperator& self, const std::vector<std::int64_t>& block,
             const std::vector<at::Tensor>& vectors) {
            const py::gil_scoped_release release;
            return self.product(block, vectors);
          },
          py::arg("block"), py::arg("vectors"),
          "The product restricted to the parameters with the indices `block`; one vector per "
          "index.")
      .def(
          "traces",
          [](const CurvatureOperator& self, const Blocks& blocks, double tolerance,
             std::int64_t min_products, std::int64_t max_products, std::uint64_t seed,
             std::uint32_t batch, std::vector<std::string> names, const Progress& progress,
             const std::function<bool()>& enough) {
            const py::gil_scoped_release release;
            auto result = hessian::hutchinson_traces(self, blocks,
                                                     {.tolerance = tolerance,
                                                      .min_products = min_products,
                                                      .max_products = max_products,
                                                      .seed = seed,
                                                      .batch = batch,
                                                      .enough = enough,
                                                      .names = std::move(names)},
                                                     progress);
            return std::pair(std::move(result.samples), result.converged);
          },
          py::arg("blocks"), py::kw_only(), py::arg("tolerance"), py::arg("min_products"),
          py::arg("max_products"), py::arg("seed"), py::arg("batch") = 0,
          py::arg("names") = std::vector<std::string>{}, py::arg("progress") = py::none(),
          py::arg("enough") = py::none(),
          "(samples [products][blocks], converged): unbiased estimates of the trace of every "
          "block.")
      .def(
          "eigenvalues",
          [](const CurvatureOperator& self, const std::vector<std::int64_t>& block,
             int max_iterations, double tolerance, std::uint64_t seed, const Progress& progress,
             const std::function<bool()>& enough) {
            hessian::LanczosResult<double> result;
            {
              const py::gil_scoped_release release;
              result = hessian::block_eigenvalues(self, block,
                                                  {.max_iterations = max_iterations,
                                                   .tolerance = tolerance,
                                                   .seed = seed,
                                                   .enough = enough},
                                                  progress);
            }
            return py::dict(py::arg("largest") = result.largest.value,
                            py::arg("smallest") = result.smallest.value,
                            py::arg("dominant") = result.dominant().value,
                            py::arg("residual") = result.dominant().residual,
                            py::arg("largest_residual") = result.largest.residual,
                            py::arg("smallest_residual") = result.smallest.residual,
                            py::arg("iterations") = result.iterations,
                            py::arg("converged") = result.converged);
          },
          py::arg("block"), py::kw_only(), py::arg("max_iterations"), py::arg("tolerance"),
          py::arg("seed"), py::arg("progress") = py::none(), py::arg("enough") = py::none(),
          "Both ends of the spectrum of one block by Lanczos: a dict of largest, smallest, "
          "dominant, residual (of the dominant pair), largest_residual, smallest_residual, "
          "iterations, converged.");

  bind_operators(m);

  m.def("require_loss", &hessian::require_loss, py::arg("loss"),
        "Raises ValueError unless the loss is one floating-point number with a graph.");
  m.def("standard_errors", &hessian::standard_errors, py::arg("samples"),
        "Standard errors of the means over the rows of samples [products][blocks].");
}

}  // namespace moq::bindings
