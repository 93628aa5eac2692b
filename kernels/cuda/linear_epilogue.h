#pragma once

#include <cstdint>

#include "kernels/common/half.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/linear.h"

/// What every linear kernel does with a finished sum. Device code only.
namespace moq::kernels::cuda {

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0F ? 0.0F : x;  // a NaN stays one
    case Activation::kGelu:
      return 0.5F * x * (1.0F + erff(x * 0.70710678118654752F));
    case Activation::kGeluTanh:
      return 0.5F * x * (1.0F + tanhf(0.79788456080286536F * (x + 0.044715F * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1.0F + expf(-1.702F * x));
    case Activation::kSilu:
      return x / (1.0F + expf(-x));
    case Activation::kTanh:
      return tanhf(x);
  }
  return x;
}

/// output[token, row] = activation(sum + bias) + residual, rounded once.
template <typename Element>
__device__ void finish(const DeviceLinearArgs& args, std::int64_t token, std::int64_t row,
                       float sum) {
  if (args.bias != nullptr) {
    sum += to_float(static_cast<const Element*>(args.bias)[row]);
  }
  float value = activate(args.activation, sum);
  if (args.residual != nullptr) {
    value +=
        to_float(static_cast<const Element*>(args.residual)[token * args.residual_stride + row]);
  }
  store_float(static_cast<Element*>(args.output) + token * args.output_stride + row, value);
}

}  // namespace moq::kernels::cuda
