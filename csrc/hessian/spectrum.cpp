#include "csrc/hessian/spectrum.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include "kernels/common/parallel.h"

namespace moq::hessian {

namespace {

template <typename Scalar>
Operator<Scalar> flat_operator(const FlatProduct& product, std::int64_t n) {
  const auto vectors = at::dtype(c10::CppTypeToScalarType<Scalar>::value);
  return [&product, n, vectors](std::span<const Scalar> x, std::span<Scalar> y) {
    // The view is only read.
    const at::Tensor in = at::from_blob(const_cast<Scalar*>(x.data()), {n}, vectors);  // NOLINT
    const at::Tensor out = product(in);
    TORCH_CHECK_VALUE(out.numel() == n && out.is_floating_point(), "hessian: a product must have ",
                      n, " floating-point elements, got shape ", out.sizes(), " of ",
                      out.scalar_type());
    at::from_blob(y.data(), {n}, vectors).copy_(out.reshape({n}));
  };
}

bool is_double(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble,
                    "hessian: dtype must be float32 or float64, got ", dtype);
  return dtype == at::kDouble;
}

LanczosResult<double> widened(const LanczosResult<float>& result) {
  return {.largest = {result.largest.value, result.largest.residual, {}},
          .smallest = {result.smallest.value, result.smallest.residual, {}},
          .iterations = result.iterations,
          .converged = result.converged,
          .history = result.history};
}

}  // namespace

LanczosResult<double> lanczos_of(const FlatProduct& product, std::int64_t n, at::ScalarType dtype,
                                 const EigenOptions& options) {
  const kernels::ThreadScope threads(at::get_num_threads());
  return is_double(dtype) ? lanczos(flat_operator<double>(product, n), n, options)
                          : widened(lanczos(flat_operator<float>(product, n), n, options));
}

SpectralQuadrature spectral_quadrature_of(const FlatProduct& product, std::int64_t n,
                                          at::ScalarType dtype, const QuadratureOptions& options) {
  const kernels::ThreadScope threads(at::get_num_threads());
  return is_double(dtype) ? spectral_quadrature(flat_operator<double>(product, n), n, options)
                          : spectral_quadrature(flat_operator<float>(product, n), n, options);
}

}  // namespace moq::hessian
