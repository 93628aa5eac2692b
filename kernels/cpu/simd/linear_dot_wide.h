#pragma once

#include <cstdint>

#include "kernels/cpu/linear_kernels.h"

// Digits of the input for instruction sets without 8-bit dot products that do not saturate: 16-bit
// integers of 11 bits. A product with an element has 19 bits, and kPieceCols of them 32.
namespace moq::kernels::cpu::MOQ_ISA {

using Digit = std::int16_t;
constexpr int kDigitBits = 11;
constexpr int kDigitsOfExact = 3;

/// Writes 16 integers as kDigits balanced digits each: for each of the first `steps` groups of four
/// columns [kDigits, 4], `stride` digits apart. Within the four, even columns come first: their
/// products are summed apart from those of odd columns.
template <int kDigits>
void write_digits(const std::int32_t* x, std::int64_t steps, std::int64_t stride, Digit* output) {
  constexpr std::int32_t kHalf = 1 << (kDigitBits - 1);
  constexpr int kColumnAt[kStepCols] = {0, 2, 1, 3};
  for (std::int64_t step = 0; step < steps; ++step) {
    for (std::int64_t i = 0; i < kStepCols; ++i) {
      std::int32_t rest = x[step * kStepCols + kColumnAt[i]];
      for (int digit = 0; digit < kDigits - 1; ++digit) {
        const std::int32_t low = ((rest + kHalf) & (2 * kHalf - 1)) - kHalf;
        output[step * stride + digit * kStepCols + i] = static_cast<Digit>(low);
        rest = (rest - low) >> kDigitBits;
      }
      output[step * stride + (kDigits - 1) * kStepCols + i] = static_cast<Digit>(rest);
    }
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
