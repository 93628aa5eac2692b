#pragma once

#include <cstdint>

namespace moq::kernels {

/// Layer normalisation of each row, with the addition of the residual stream fused in front:
///
///   x      = input + residual
///   output = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias
///
/// float32 throughout; mean first, then the (biased) variance of the differences, each summed in an
/// order that depends on hidden_size alone: a row's result does not depend on its neighbours.
/// A null sum is not written.
struct LayerNormArgs {
  const float* input;               ///< [num_tokens, hidden_size], row-major
  const float* residual = nullptr;  ///< [num_tokens, hidden_size]; null: nothing is added
  float* sum = nullptr;         ///< [num_tokens, hidden_size], receives x; may be input or residual
  const float* weight;          ///< [hidden_size]
  const float* bias = nullptr;  ///< [hidden_size]; null: 0
  float* output;                ///< [num_tokens, hidden_size]; may be input or residual, not sum
  std::int64_t num_tokens;      ///< >= 0
  std::int64_t hidden_size;     ///< >= 1
  float epsilon;
};

/// Root-mean-square normalisation, as layer_norm without mean and bias:
///
///   x      = input + residual
///   output = x / sqrt(mean(x^2) + epsilon) * weight
///
/// A null sum is not written.
struct RmsNormArgs {
  const float* input;               ///< [num_tokens, hidden_size], row-major
  const float* residual = nullptr;  ///< [num_tokens, hidden_size]; null: nothing is added
  float* sum = nullptr;      ///< [num_tokens, hidden_size], receives x; may be input or residual
  const float* weight;       ///< [hidden_size]
  float* output;             ///< [num_tokens, hidden_size]; may be input or residual, not sum
  std::int64_t num_tokens;   ///< >= 0
  std::int64_t hidden_size;  ///< >= 1
  float epsilon;
};

namespace cpu {
/// @throws moq::Error if a size is out of range, or sum is output.
void layer_norm(const LayerNormArgs& args);
/// @throws moq::Error if a size is out of range, or sum is output.
void rms_norm(const RmsNormArgs& args);
}  // namespace cpu

}  // namespace moq::kernels
