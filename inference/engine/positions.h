#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "inference/engine/model_spec.h"

namespace moq::inference {

/// The slopes of Press et al. 2022: a geometric sequence for a power of two of heads; otherwise
/// that of the next smaller power, then every other one of the next larger.
std::vector<float> alibi_slopes(std::int64_t num_heads);

/// Cosines and sines of a model's rotary positions, for as many positions as were needed so far.
class RotationTable {
 public:
  /// Makes the table cover the positions, each below the spec's max_positions.
  void reserve(const ModelSpec& spec, std::span<const std::int64_t> positions);

  std::int64_t num_positions() const { return num_positions_; }
  const float* cos() const { return cos_.data(); }  ///< [num_positions, rotary_dim / 2]
  const float* sin() const { return sin_.data(); }  ///< the same

 private:
  std::int64_t num_positions_ = 0;
  std::vector<float> cos_;
  std::vector<float> sin_;
};

}  // namespace moq::inference
