#pragma once

#include <cstdint>

#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/statistics.h"
#include "kernels/cpu/simd/vector.h"
#include "kernels/quant_grid.h"

/// INT8 quantization of one row of activations. Elements are float, Float16 or BFloat16.
namespace moq::kernels::cpu::MOQ_ISA {

/// What the grid of a row depends on.
template <typename Element>
inline GroupStatistics activation_statistics(const Element* row, std::int64_t size,
                                             QuantMode mode) {
  return is_symmetric(mode) ? statistics_of<QuantMode::kSymmetric>(row, size)
                            : statistics_of<QuantMode::kAsymmetric>(row, size);
}

/// Grid of one row of activations, with a float32 scale. The operator quantize_activation and the
/// INT8 matrix products, which write codes in their own layout, both ask here.
inline GridParams activation_grid(const GroupStatistics& row, QuantMode mode) {
  return make_grid(row, 8, mode, DType::kFloat32);
}

/// Codes of one row: clamp(rint(input * inverse_scale) + zero_point, qmin, qmax), and 0 where that
/// is a NaN, be it the element's or the grid's.
template <typename Element>
inline void quantize_row(const Element* input, std::int64_t size, const GridParams& grid,
                         std::int8_t* codes) {
  const F32 inverse_scale = broadcast(grid.inverse_scale);
  const F32 zero_point = broadcast(static_cast<float>(grid.zero_point));
  const F32 qmin = broadcast(static_cast<float>(grid.range.qmin));
  const F32 qmax = broadcast(static_cast<float>(grid.range.qmax));
  for_each_vector<false>(codes, size, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
    const F32 rounded = round_nearest(load_some(input + i, count) * inverse_scale);
    const F32 code = minimum(maximum(rounded + zero_point, qmin), qmax);
    std::int8_t vector[kWidth];
    store(vector, convert<I32>(rounded == rounded ? code : F32{}));
    std::memcpy(codes + i, vector, static_cast<std::size_t>(count));
  });
}

}  // namespace moq::kernels::cpu::MOQ_ISA
