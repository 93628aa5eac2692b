#include "inference/engine/positions.h"

#include <algorithm>
#include <cmath>

#include "kernels/rotary.h"

namespace moq::inference {
namespace {

constexpr std::int64_t kFewestPositions = 512;

}  // namespace

std::vector<float> alibi_slopes(std::int64_t num_heads) {
  std::int64_t power = 1;
  while (2 * power <= num_heads) {
    power *= 2;
  }
  std::vector<float> slopes;
  for (std::int64_t head = 0; head < num_heads; ++head) {
    const double exponent =
        head < power
            ? -8.0 * static_cast<double>(head + 1) / static_cast<double>(power)
            : -4.0 * static_cast<double>(2 * (head - power) + 1) / static_cast<double>(power);
    slopes.push_back(static_cast<float>(std::exp2(exponent)));
  }
  return slopes;
}

void RotationTable::reserve(const ModelSpec& spec, std::span<const std::int64_t> positions) {
  const auto last = std::max_element(positions.begin(), positions.end());
  if (last == positions.end() || *last < num_positions_) {
    return;
  }
  const std::int64_t num_positions =
      std::min(std::max(2 * (*last + 1), kFewestPositions), spec.max_positions);
  const auto size = static_cast<std::size_t>(num_positions * spec.rotary_dim() / 2);
  cos_.resize(size);
  sin_.resize(size);
  kernels::cpu::rotary_table(
      {.theta = static_cast<float>(spec.rope_theta),
       .rotary_dim = spec.rotary_dim(),
       .num_positions = num_positions,
       .scaling = spec.rope_scaling,
       .factor = static_cast<float>(spec.rope_factor),
       .low_frequency_factor = static_cast<float>(spec.rope_low_freq_factor),
       .high_frequency_factor = static_cast<float>(spec.rope_high_freq_factor),
       .original_max_position = static_cast<float>(spec.rope_original_positions),
       .cos = cos_.data(),
       .sin = sin_.data()});
  num_positions_ = num_positions;
}

}  // namespace moq::inference
