#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/linear_kernels.h"

namespace moq::kernels::cpu::MOQ_ISA {

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

/// Fetches the lines that store_row will write, before the sums are computed: large outputs lie
/// far.
inline void ask_for_rows(const OutputRows& output, std::int64_t row, std::int64_t rows,
                         std::int64_t panel) {
  const float* target = output.output + row * output.output_stride + panel * kPanelRows;
  for (std::int64_t i = 0; i < rows; ++i, target += output.output_stride) {
    __builtin_prefetch(target, /*rw=*/1, /*locality=*/2);
    __builtin_prefetch(target + kPanelRows / 2, /*rw=*/1, /*locality=*/2);
  }
}

/// output[row, columns of the panel] = float(sums * unit + bias) + residual.
template <typename Sum>
inline void store_row(const OutputRows& output, std::int64_t row, std::int64_t panel,
                      const Sum* sums, Sum unit) {
  const std::int64_t col = panel * kPanelRows;
  const std::int64_t width = panel_width(output, panel);
  alignas(64) float padded[2][kPanelRows];
  alignas(64) float result[kPanelRows];
  const float* bias = whole_panel(output.bias, col, width, padded[0]);
  const float* residual = whole_panel(
      output.residual == nullptr ? nullptr : output.residual + row * output.residual_stride, col,
      width, padded[1]);
  for (std::int64_t i = 0; i < kPanelRows; ++i) {
    result[i] = static_cast<float>(sums[i] * unit + bias[i]) + residual[i];
  }
  float* target = output.output + row * output.output_stride + col;
  if (width == kPanelRows) {
    std::memcpy(target, result, sizeof(result));  // of constant size: no call
  } else {
    std::memcpy(target, result, width * sizeof(float));
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
