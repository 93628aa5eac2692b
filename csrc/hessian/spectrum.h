#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "csrc/hessian/solvers/eigen_solvers.h"
#include "csrc/hessian/solvers/spectral_quadrature.h"

/// The solvers for matrices that are given by products of torch.
namespace moq::hessian {

/// A x for a vector x [n] on the CPU, which is only read and only until the product is made. The
/// result has n elements of any shape, floating dtype and device.
using FlatProduct = std::function<at::Tensor(const at::Tensor& x)>;

/// lanczos of A [n, n], without vectors.
///
/// @param dtype  of the vectors, at::kFloat or at::kDouble
/// @throws c10::ValueError if dtype is another or a product has another number of elements;
///     moq::Error as lanczos.
LanczosResult<double> lanczos_of(const FlatProduct& product, std::int64_t n, at::ScalarType dtype,
                                 const EigenOptions& options);

/// spectral_quadrature of A [n, n].
///
/// @param dtype  of the vectors, at::kFloat or at::kDouble
/// @throws c10::ValueError if dtype is another or a product has another number of elements;
///     moq::Error as spectral_quadrature.
SpectralQuadrature spectral_quadrature_of(const FlatProduct& product, std::int64_t n,
                                          at::ScalarType dtype, const QuadratureOptions& options);

}  // namespace moq::hessian
