#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/cpu/simd/vector.h"

namespace moq::kernels::cpu::MOQ_ISA {

/// As many float64 numbers as a vector register holds.
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
constexpr int kDoubles = kWidth / 2;
using F64 = double __attribute__((vector_size(8 * kDoubles)));
using HalfF32 = float __attribute__((vector_size(4 * kDoubles)));
using HalfI32 = std::int32_t __attribute__((vector_size(4 * kDoubles)));
#else
constexpr int kDoubles = 1;
using F64 = double;
using HalfF32 = float;
using HalfI32 = std::int32_t;
#endif

template <typename Half>
[[gnu::always_inline]] inline F64 load_doubles(const void* values) {
  return convert<F64>(load_bits<Half>(values));
}

/// Columns of a panel that the matrix has: the last panel is padded.
inline std::int64_t panel_width(const OutputRows& output, std::int64_t panel) {
  const std::int64_t left = output.n - panel * kPanelRows;
  return left < kPanelRows ? left : kPanelRows;
}

/// 32 numbers of a row of `values` from column `col` on, as an array that may be read in full:
/// zeros if there is no such row, a copy in `padded` if it ends before.
inline const float* whole_panel(const float* values, std::int64_t col, std::int64_t width,
                                float* padded) {
  if (values != nullptr && width == kPanelRows) {
    return values + col;
  }
  std::memset(padded, 0, kPanelRows * sizeof(float));
  if (values != nullptr) {
    std::memcpy(padded, values + col, width * sizeof(float));
  }
  return padded;
}

/// result = float(sums * unit + bias) + residual, 32 of each; result may be residual.
inline void round_sums(const double* sums, double unit, const float* bias, const float* residual,
                       float* result) {
  for (std::int64_t i = 0; i < kPanelRows; i += kDoubles) {
    const F64 sum = load_bits<F64>(sums + i) * unit + load_doubles<HalfF32>(bias + i);
    const HalfF32 rounded = convert<HalfF32>(sum) + load_bits<HalfF32>(residual + i);
    std::memcpy(result + i, &rounded, sizeof(rounded));
  }
}

inline void round_sums(const float* sums, float unit, const float* bias, const float* residual,
                       float* result) {
  for (std::int64_t i = 0; i < kPanelRows; i += kWidth) {
    store(result + i, load(sums + i) * broadcast(unit) + load(bias + i) + load(residual + i));
  }
}

/// output[row, columns of the panel] = float(sums * unit + bias) + residual.
template <typename Sum>
inline void store_row(const OutputRows& output, std::int64_t row, std::int64_t panel,
                      const Sum* sums, Sum unit) {
  const std::int64_t col = panel * kPanelRows;
  const std::int64_t width = panel_width(output, panel);
  alignas(64) float padded[2][kPanelRows];
  const float* bias = whole_panel(output.bias, col, width, padded[0]);
  const float* residual = whole_panel(
      output.residual == nullptr ? nullptr : output.residual + row * output.residual_stride, col,
      width, padded[1]);
  float* target = output.output + row * output.output_stride + col;
  if (width == kPanelRows) {
    round_sums(sums, unit, bias, residual, target);
  } else {
    alignas(64) float result[kPanelRows];
    round_sums(sums, unit, bias, residual, result);
    std::memcpy(target, result, width * sizeof(float));
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
