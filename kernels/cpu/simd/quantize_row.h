#pragma once

#include <cstdint>

#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/statistics.h"
#include "kernels/cpu/simd/vector.h"
#include "kernels/quant_grid.h"

/// Symmetric INT8 quantization of one row of activations. Elements are float, Float16 or BFloat16.
namespace moq::kernels::cpu::MOQ_ISA {

/// Grid of one row of activations: float32 scale, codes in [-127, 127]. The operator
/// quantize_activation and the INT8 matrix products, which write codes in their own layout, both
/// ask here.
inline GridParams activation_grid(const GroupStatistics& row) {
  return make_grid(row, 8, QuantMode::kSymmetric, DType::kFloat32);
}

/// Codes of one row: clamp(rint(input * inverse_scale), -127, 127), and 0 where that is a NaN, be
/// it the element's or the grid's.
template <typename Element>
inline void quantize_row(const Element* input, std::int64_t size, const GridParams& grid,
                         std::int8_t* codes) {
  const F32 inverse_scale = broadcast(grid.inverse_scale);
  const F32 qmax = broadcast(static_cast<float>(grid.range.qmax));
  for_each_vector<false>(codes, size, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
    const F32 rounded = round_nearest(load_some(input + i, count) * inverse_scale);
    const F32 number = rounded == rounded ? rounded : F32{};
    std::int8_t vector[kWidth];
    store(vector, convert<I32>(minimum(maximum(number, -qmax), qmax)));
    std::memcpy(codes + i, vector, static_cast<std::size_t>(count));
  });
}

}  // namespace moq::kernels::cpu::MOQ_ISA
