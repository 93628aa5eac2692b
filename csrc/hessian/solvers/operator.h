#pragma once

#include <functional>
#include <span>

namespace moq::hessian {

/// A real symmetric matrix A of size n that exists only as a product: writes A x to y.
/// Both spans have n elements and do not overlap; y comes uninitialised.
template <typename Scalar>
using Operator = std::function<void(std::span<const Scalar> x, std::span<Scalar> y)>;

}  // namespace moq::hessian
