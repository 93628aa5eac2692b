#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>
#include <vector>

#include "csrc/bindings/bindings.h"
#include "csrc/hessian/sensitivity.h"

namespace moq::bindings {

namespace {

namespace py = pybind11;
using hessian::Blocks;
using hessian::HvpOperator;
using hessian::Progress;

}  // namespace

void bind_hessian(py::module_& m) {
  py::class_<HvpOperator>(
      m, "HvpOperator",
      "The Hessian of a scalar loss in a list of parameters, as an exact product "
      "(csrc/hessian/hvp.h). Holds the graph of the loss until it is deleted.",
      // Nodes of the graph that belong to Python take the lock themselves.
      py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const at::Tensor& loss, std::vector<at::Tensor> parameters) {
             const py::gil_scoped_release release;
             return std::make_unique<HvpOperator>(loss, std::move(parameters));
           }),
           py::arg("loss"), py::arg("parameters"),
           "Raises NotImplementedError, naming the operation, if the graph is not twice "
           "differentiable.")
      .def(
          "product",
          [](const HvpOperator& self, const std::vector<std::int64_t>& block,
             const std::vector<at::Tensor>& vectors) {
            const py::gil_scoped_release release;
            return self.product(block, vectors);
          },
          py::arg("block"), py::arg("vectors"),
          "H v, restricted to the parameters with the indices `block`; one vector per index.")
      .def(
          "traces",
          [](const HvpOperator& self, const Blocks& blocks, double tolerance,
             std::int64_t min_products, std::int64_t max_products, std::uint64_t seed,
             std::uint32_t batch, const Progress& progress) {
            const py::gil_scoped_release release;
            auto result = hessian::hutchinson_traces(self, blocks,
                                                     {.tolerance = tolerance,
                                                      .min_products = min_products,
                                                      .max_products = max_products,
                                                      .seed = seed,
                                                      .batch = batch},
                                                     progress);
            return std::pair(std::move(result.samples), result.converged);
          },
          py::arg("blocks"), py::kw_only(), py::arg("tolerance"), py::arg("min_products"),
          py::arg("max_products"), py::arg("seed"), py::arg("batch") = 0,
          py::arg("progress") = py::none(),
          "(samples [products][blocks], converged): unbiased estimates of the trace of every "
          "block.")
      .def(
          "eigenvalues",
          [](const HvpOperator& self, const std::vector<std::int64_t>& block, int max_iterations,
             double tolerance, std::uint64_t seed, const Progress& progress) {
            hessian::LanczosResult<double> result;
            {
              const py::gil_scoped_release release;
              result = hessian::block_eigenvalues(
                  self, block,
                  {.max_iterations = max_iterations, .tolerance = tolerance, .seed = seed},
                  progress);
            }
            return py::dict(py::arg("largest") = result.largest.value,
                            py::arg("smallest") = result.smallest.value,
                            py::arg("dominant") = result.dominant().value,
                            py::arg("residual") = result.dominant().residual,
                            py::arg("iterations") = result.iterations,
                            py::arg("converged") = result.converged);
          },
          py::arg("block"), py::kw_only(), py::arg("max_iterations"), py::arg("tolerance"),
          py::arg("seed"), py::arg("progress") = py::none(),
          "Both ends of the spectrum of one block by Lanczos: a dict of largest, smallest, "
          "dominant, residual "
          "(of the dominant pair), iterations, converged.");

  m.def("standard_errors", &hessian::standard_errors, py::arg("samples"),
        "Standard errors of the means over the rows of samples [products][blocks].");
}

}  // namespace moq::bindings
