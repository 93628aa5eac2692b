#pragma once

#include "kernels/cpu/simd/float_math.h"

/// Products of small row-major float matrices that lie in a core's own caches.
namespace moq::kernels::cpu::MOQ_ISA {

/// Rows of floats, `stride` apart.
template <typename Float>
struct Matrix {
  Float* data;
  std::int64_t stride;

  Float* row(std::int64_t i) const { return data + i * stride; }
};

/// The block of sums that stays in registers while k runs: rows x vectors of columns.
constexpr int kBlockRows = 4;
#if defined(MOQ_ISA_avx512)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif

/// One block of `multiply_add`; its last vector has `last` columns.
template <int kRows, int kVectors>
void multiply_add_block(Matrix<const float> a, Matrix<const float> b, const float* factors,
                        Matrix<float> output, std::int64_t k, std::int64_t last) {
  F32 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = load(output.row(r) + v * kWidth) * factors[r];
    }
  }
  const auto step = [&](std::int64_t i, const auto& load_last) {
    F32 vectors[kVectors];
    for (int v = 0; v + 1 < kVectors; ++v) {
      vectors[v] = load(b.row(i) + v * kWidth);
    }
    vectors[kVectors - 1] = load_last(b.row(i) + (kVectors - 1) * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const F32 factor = broadcast(a.row(r)[i]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(factor, vectors[v], sums[r][v]);
      }
    }
  };
  if (last == kWidth) {
    for (std::int64_t i = 0; i < k; ++i) {
      step(i, [](const float* x) { return load(x); });
    }
  } else {
    for (std::int64_t i = 0; i < k; ++i) {
      step(i, [&](const float* x) { return load_first(x, last); });
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      store(output.row(r) + v * kWidth, sums[r][v]);
    }
  }
}

/// `multiply_add` for kRows rows.
template <int kRows>
void multiply_add_rows(Matrix<const float> a, Matrix<const float> b, const float* factors,
                       Matrix<float> output, std::int64_t k, std::int64_t columns) {
  std::int64_t j = 0;
  const auto at = [&](auto matrix) {
    matrix.data += j;
    return matrix;
  };
  for (; j + kBlockVectors * kWidth <= columns; j += kBlockVectors * kWidth) {
    multiply_add_block<kRows, kBlockVectors>(a, at(b), factors, at(output), k, kWidth);
  }
  for (; j < columns; j += kWidth) {
    const std::int64_t last = columns - j < kWidth ? columns - j : kWidth;
    multiply_add_block<kRows, 1>(a, at(b), factors, at(output), k, last);
  }
}

/// output[r, :] = factors[r] * output[r, :] + a[r, 0:k] x b[0:k, :]
///
/// Rows are taken in groups; k_of(r), r the last row of a group, is the k of the group. An
/// element's sum runs over k in order, whatever the group. Rows of the output have room for whole
/// vectors.
template <typename KOf>
void multiply_add(Matrix<const float> a, Matrix<const float> b, const float* factors,
                  Matrix<float> output, std::int64_t rows, std::int64_t columns, const KOf& k_of) {
  for (std::int64_t r = 0; r < rows; r += kBlockRows) {
    const std::int64_t group = rows - r < kBlockRows ? rows - r : kBlockRows;
    const std::int64_t k = k_of(r + group - 1);
    const Matrix<const float> a_rows{a.row(r), a.stride};
    const Matrix<float> output_rows{output.row(r), output.stride};
    switch (group) {
      case 1:
        multiply_add_rows<1>(a_rows, b, factors + r, output_rows, k, columns);
        break;
      case 2:
        multiply_add_rows<2>(a_rows, b, factors + r, output_rows, k, columns);
        break;
      case 3:
        multiply_add_rows<3>(a_rows, b, factors + r, output_rows, k, columns);
        break;
      default:
        multiply_add_rows<kBlockRows>(a_rows, b, factors + r, output_rows, k, columns);
    }
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
