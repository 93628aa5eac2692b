#pragma once

#include <cstdint>

#include "kernels/cpu/simd/statistics.h"
#include "kernels/cpu/simd/vector.h"
#include "kernels/quant_grid.h"

/// Symmetric INT8 quantization of one row of activations, for every kernel that needs it: the
/// operator quantize_activation and the INT8 matrix products give the same codes because both call
/// these. Elements are float, Float16 or BFloat16.
namespace moq::kernels::cpu::MOQ_ISA {

/// Grid of one row of activations: float32 scale, codes in [-127, 127].
template <typename Element>
inline GridParams activation_grid(const Element* input, std::int64_t size) {
  return make_grid(statistics_of<QuantMode::kSymmetric>(input, size), 8, QuantMode::kSymmetric,
                   DType::kFloat32);
}

/// Codes of one row under a grid that exists: codes = clamp(rint(input * inverse_scale), -127,
/// 127).
template <typename Element>
inline void quantize_row(const Element* input, std::int64_t size, const GridParams& grid,
                         std::int8_t* codes) {
  const F32 inverse_scale = broadcast(grid.inverse_scale);
  const F32 qmax = broadcast(static_cast<float>(grid.range.qmax));
  std::int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const F32 rounded = round_nearest(load(input + i) * inverse_scale);
    const F32 number = rounded == rounded ? rounded : F32{};
    store(codes + i, convert<I32>(minimum(maximum(number, -qmax), qmax)));
  }
  for (; i < size; ++i) {
    codes[i] =
        static_cast<std::int8_t>(quantize_one(to_float(input[i]), grid, Rounding::kNearest, 0.0F));
  }
}

/// Quantizes one row by its own absmax and returns the row's scale.
/// A row that holds a NaN or an infinity gives codes 0 and scale NaN.
template <typename Element>
inline float quantize_row(const Element* input, std::int64_t size, std::int8_t* codes) {
  const GridParams grid = activation_grid(input, size);
  if (std::isnan(grid.scale)) {
    std::memset(codes, 0, static_cast<std::size_t>(size));
  } else {
    quantize_row(input, size, grid, codes);
  }
  return grid.scale;
}

}  // namespace moq::kernels::cpu::MOQ_ISA
