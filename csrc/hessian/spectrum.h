#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "csrc/hessian/solvers/spectral_quadrature.h"

namespace moq::hessian {

/// A x for a vector x [n] on the CPU, which is only read and only until the product is made. The
/// result has n elements of any shape, floating dtype and device.
using FlatProduct = std::function<at::Tensor(const at::Tensor& x)>;

/// spectral_quadrature of a symmetric matrix A [n, n] given by products of torch.
///
/// @param dtype  of the vectors, at::kFloat or at::kDouble
/// @throws c10::ValueError if dtype is another or a product has another number of elements;
///     moq::Error as spectral_quadrature.
SpectralQuadrature spectral_quadrature_of(const FlatProduct& product, std::int64_t n,
                                          at::ScalarType dtype, const QuadratureOptions& options);

}  // namespace moq::hessian
