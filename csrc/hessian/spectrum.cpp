#include "csrc/hessian/spectrum.h"

#include <ATen/ops/from_blob.h>

namespace moq::hessian {

namespace {

template <typename Scalar>
SpectralQuadrature quadrature_in(const FlatProduct& product, std::int64_t n,
                                 const QuadratureOptions& options) {
  const auto vectors = at::dtype(c10::CppTypeToScalarType<Scalar>::value);
  const Operator<Scalar> flat = [&](std::span<const Scalar> x, std::span<Scalar> y) {
    // The view is only read.
    const at::Tensor in = at::from_blob(const_cast<Scalar*>(x.data()), {n}, vectors);  // NOLINT
    const at::Tensor out = product(in);
    TORCH_CHECK_VALUE(out.numel() == n && out.is_floating_point(), "spectrum: a product must have ",
                      n, " floating-point elements, got shape ", out.sizes(), " of ",
                      out.scalar_type());
    at::from_blob(y.data(), {n}, vectors).copy_(out.reshape({n}));
  };
  return spectral_quadrature(flat, n, options);
}

}  // namespace

SpectralQuadrature spectral_quadrature_of(const FlatProduct& product, std::int64_t n,
                                          at::ScalarType dtype, const QuadratureOptions& options) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble,
                    "spectrum: dtype must be float32 or float64, got ", dtype);
  return dtype == at::kDouble ? quadrature_in<double>(product, n, options)
                              : quadrature_in<float>(product, n, options);
}

}  // namespace moq::hessian
