#pragma once

#include <cstdint>

namespace moq::kernels {

/// Elementwise functions between the two halves of a feed-forward block.
enum class Activation : std::uint8_t {
  kNone,       ///< x
  kRelu,       ///< max(x, 0); NaN stays NaN
  kGelu,       ///< x * Phi(x), Phi the standard normal distribution function
  kGeluTanh,   ///< x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
  kQuickGelu,  ///< x * sigmoid(1.702 * x)
  kSilu,       ///< x * sigmoid(x)
  kTanh,       ///< tanh(x), the pooler of BERT
};

constexpr const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return "none";
    case Activation::kRelu:
      return "relu";
    case Activation::kGelu:
      return "gelu";
    case Activation::kGeluTanh:
      return "gelu_tanh";
    case Activation::kQuickGelu:
      return "quick_gelu";
    case Activation::kSilu:
      return "silu";
    case Activation::kTanh:
      return "tanh";
  }
  return "unknown";
}

/// output[i] = f(input[i]) for size elements, float32. Each element is computed by itself: its
/// result does not depend on its place or on the number of threads.
struct ActivationArgs {
  const float* input;  ///< [size]
  float* output;       ///< [size]; may be input
  std::int64_t size;   ///< >= 0
  Activation activation;
};

/// The gated form of a feed-forward block (SwiGLU with kSilu, GeGLU with kGelu or kGeluTanh),
/// float32:
///
///   output[i, j] = f(gate_up[i, j]) * gate_up[i, n + j]
struct GatedActivationArgs {
  const float* gate_up;  ///< [m, 2 * n], row-major: gate in the first n columns, up in the others
  float* output;         ///< [m, n], row-major; does not overlap gate_up
  std::int64_t m;        ///< >= 0
  std::int64_t n;        ///< >= 0
  Activation activation;
};

/// output[i, j] = exp(input[i, j]) / sum_k exp(input[i, k]), computed after subtracting the row's
/// maximum; float32, the sum accumulated in float32 in an order that depends on n alone. Elements
/// of -infinity get 0; a row of nothing else, or with a NaN or +infinity, gives NaN throughout.
struct SoftmaxArgs {
  const float* input;  ///< [m, n], row-major
  float* output;       ///< [m, n], row-major; may be input
  std::int64_t m;      ///< >= 0
  std::int64_t n;      ///< >= 0
};

namespace cpu {
/// @throws moq::Error if a size is negative.
void activation(const ActivationArgs& args);
/// @throws moq::Error if a size is negative.
void gated_activation(const GatedActivationArgs& args);
/// @throws moq::Error if a size is negative.
void softmax(const SoftmaxArgs& args);
}  // namespace cpu

}  // namespace moq::kernels
