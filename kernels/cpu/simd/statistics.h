#pragma once

#include <cstdint>

#include "kernels/cpu/simd/vector.h"
#include "kernels/quant_grid.h"

/// Collects what quant_grid.h decides a grid by.
namespace moq::kernels::cpu::MOQ_ISA {

[[gnu::always_inline]] inline I32 ordered_lanes(I32 bits) {
  return bits ^ ((bits >> 31) & kMagnitudeMask);
}

/// Statistics of `size` elements: see quant_grid.h.
template <QuantMode kMode, typename Element>
inline GroupStatistics statistics_of(const Element* input, std::int64_t size) {
  constexpr bool kSymmetric = kMode == QuantMode::kSymmetric;
  I32 lowest{};
  I32 highest{};
  std::int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const I32 bits = bit_cast<I32>(load(input + i));
    if constexpr (kSymmetric) {
      highest = maximum(highest, bits & kMagnitudeMask);
    } else {
      const I32 ordered = ordered_lanes(bits);
      lowest = minimum(lowest, ordered);
      highest = maximum(highest, ordered);
    }
  }
  GroupStatistics group{kSymmetric ? 0 : reduce_min(lowest), reduce_max(highest)};
  for (; i < size; ++i) {
    const auto bits = bit_cast<std::int32_t>(to_float(input[i]));
    const std::int32_t ordered = kSymmetric ? bits & kMagnitudeMask : ordered_bits(bits);
    group.lowest = kSymmetric ? 0 : minimum(group.lowest, ordered);
    group.highest = maximum(group.highest, ordered);
  }
  return group;
}

}  // namespace moq::kernels::cpu::MOQ_ISA
