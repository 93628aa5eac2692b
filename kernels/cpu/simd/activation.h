#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/cpu/isa.h"

/// What kernels/cpu/activation.cpp asks of each instruction set: parts of the work that one thread
/// does, without checks.
namespace moq::kernels::cpu {

// clang-format off
MOQ_FOR_EACH_ISA(
  void activation_elements(Activation activation, const float* input, float* output, std::int64_t size);
  void gated_activation_rows(const GatedActivationArgs& args, std::int64_t begin, std::int64_t end);
  void softmax_rows(const SoftmaxArgs& args, std::int64_t begin, std::int64_t end);

  /// The two halves of a softmax, which sampling also takes one by one.
  /// The largest score, NaN if one is NaN.
  float largest(const float* scores, std::int64_t size);
  /// weights[i] = exp((scores[i] - largest) / temperature); may be in place.
  void relative_weights(const float* scores, float* weights, std::int64_t size, float largest,
                        float temperature);
)
// clang-format on

}  // namespace moq::kernels::cpu
