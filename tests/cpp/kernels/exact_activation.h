#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/activation.h"

namespace moq::kernels::testing {

/// The definitions of activation.h in float64, free of cancellation.
inline double exact_activation(Activation activation, double x) {
  const auto sigmoid = [](double u) { return 1.0 / (1.0 + std::exp(-u)); };
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::numbers::sqrt2);
    case Activation::kGeluTanh:
      return x * sigmoid(2.0 * std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x));
    case Activation::kQuickGelu:
      return x * sigmoid(1.702 * x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kTanh:
      return std::tanh(x);
  }
  return x;
}

}  // namespace moq::kernels::testing
