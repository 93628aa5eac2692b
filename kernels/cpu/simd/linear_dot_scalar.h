#pragma once

#include <cstdint>

#include "kernels/cpu/simd/linear_dot_wide.h"

// Innermost loop of the integer linear kernel for any processor.
namespace moq::kernels::cpu::scalar {

constexpr int kMaxVectors = 3;
constexpr int kPairVectors = 0;  // panels are multiplied one by one

/// sums[v][row] = Σ element[row] * digit[v] over the columns of some blocks, for the 32 rows of one
/// panel and kVectors vectors.
template <int kBits, int kVectors, int kPanels>
void dot(const std::uint8_t* weight, std::int64_t /*panel_bytes*/, std::int64_t blocks,
         const Prefetch& /*prefetch*/, const Digit* input, std::int32_t* sums) {
  static_assert(kPanels == 1);
  constexpr int kSteps = 8 / kBits;
  constexpr int kMask = (1 << kBits) - 1;
  for (std::int64_t i = 0; i < kVectors * kPanelRows; ++i) {
    sums[i] = 0;
  }
  for (std::int64_t i = 0; i < blocks; ++i) {
    for (int step = 0; step < kSteps; ++step) {
      for (int v = 0; v < kVectors; ++v) {
        const Digit* x = input + (step * kVectors + v) * kStepCols;
        for (std::int64_t row = 0; row < kPanelRows; ++row) {
          const std::uint8_t* bytes = weight + row * kStepCols;
          const auto element = [&](int col) { return (bytes[col] >> (step * kBits)) & kMask; };
          sums[v * kPanelRows + row] +=
              element(0) * x[0] + element(2) * x[1] + element(1) * x[2] + element(3) * x[3];
        }
      }
    }
    weight += kBlockBytes;
    input += kSteps * kVectors * kStepCols;
  }
}

}  // namespace moq::kernels::cpu::scalar
