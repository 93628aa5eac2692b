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

/// Rows that finish_quad takes at once.
constexpr int kQuad = 4;

/// Whether four neighbouring rows of bias, residual and output can be accessed at once.
template <typename Element>
__device__ bool takes_quads(const DeviceLinearArgs& args) {
  constexpr std::int64_t kBytes = kQuad * sizeof(Element);
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % kBytes == 0;
  };
  return aligned(args.output) && aligned(args.bias) && aligned(args.residual) &&
         args.output_stride % kQuad == 0 && args.residual_stride % kQuad == 0;
}

/// finish for four rows from `row`, of which rows below n exist.
template <typename Element>
__device__ void finish_quad(const DeviceLinearArgs& args, std::int64_t token, std::int64_t row,
                            std::int64_t n, const float (&sums)[kQuad], bool whole) {
  struct alignas(kQuad * sizeof(Element)) Quad {
    Element element[kQuad];
  };
  if (!whole || row + kQuad > n) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (row + i < n) {
        finish<Element>(args, token, row + i, sums[i]);
      }
    }
    return;
  }
  Quad bias{};
  Quad residual{};
  Quad output;
  if (args.bias != nullptr) {
    bias = *reinterpret_cast<const Quad*>(static_cast<const Element*>(args.bias) + row);
  }
  if (args.residual != nullptr) {
    residual = *reinterpret_cast<const Quad*>(static_cast<const Element*>(args.residual) +
                                              token * args.residual_stride + row);
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const float value = activate(args.activation, sums[i] + to_float(bias.element[i]));
    store_float(&output.element[i], value + to_float(residual.element[i]));
  }
  *reinterpret_cast<Quad*>(static_cast<Element*>(args.output) + token * args.output_stride + row) =
      output;
}

}  // namespace moq::kernels::cuda
