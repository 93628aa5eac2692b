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

constexpr std::int64_t round_up(std::int64_t size) {
  return (size + kWidth - 1) / kWidth * kWidth;
}

/// Which part of a product a group of rows needs.
struct Extent {
  std::int64_t k;
  std::int64_t columns;
};

/// The block of sums that stays in registers while k runs: rows x vectors of columns.
constexpr int kBlockRows = 4;
#if defined(MOQ_ISA_avx512)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif

/// One block of `multiply`; its last vector has `last` columns.
template <bool kAdd, int kRows, int kVectors>
void multiply_block(Matrix<const float> a, Matrix<const float> b, const float* factors,
                    Matrix<float> output, std::int64_t k, std::int64_t last) {
  F32 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = kAdd ? load(output.row(r) + v * kWidth) * factors[r] : F32{};
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

/// `multiply` for kRows rows.
template <bool kAdd, int kRows>
void multiply_rows(Matrix<const float> a, Matrix<const float> b, const float* factors,
                   Matrix<float> output, Extent extent) {
  std::int64_t j = 0;
  const auto at = [&](auto matrix) {
    matrix.data += j;
    return matrix;
  };
  for (; j + kBlockVectors * kWidth <= extent.columns; j += kBlockVectors * kWidth) {
    multiply_block<kAdd, kRows, kBlockVectors>(a, at(b), factors, at(output), extent.k, kWidth);
  }
  for (; j < extent.columns; j += kWidth) {
    const std::int64_t last = extent.columns - j < kWidth ? extent.columns - j : kWidth;
    multiply_block<kAdd, kRows, 1>(a, at(b), factors, at(output), extent.k, last);
  }
}

/// output[r, :] = (kAdd ? factors[r] * output[r, :] : 0) + a[r, 0:k] x b[0:k, :]
///
/// Rows are taken in groups; extent_of(r), r the last row of a group, gives the k and the columns
/// that the group needs. An element's sum runs over k in order, whatever the group. Rows of the
/// output have room for whole vectors.
template <bool kAdd, typename ExtentOf>
void multiply(Matrix<const float> a, Matrix<const float> b, const float* factors,
              Matrix<float> output, std::int64_t rows, const ExtentOf& extent_of) {
  for (std::int64_t r = 0; r < rows; r += kBlockRows) {
    const Matrix<const float> a_rows{a.row(r), a.stride};
    const Matrix<float> output_rows{output.row(r), output.stride};
    const float* row_factors = kAdd ? factors + r : nullptr;
    switch (rows - r) {
      case 1:
        multiply_rows<kAdd, 1>(a_rows, b, row_factors, output_rows, extent_of(r));
        break;
      case 2:
        multiply_rows<kAdd, 2>(a_rows, b, row_factors, output_rows, extent_of(r + 1));
        break;
      case 3:
        multiply_rows<kAdd, 3>(a_rows, b, row_factors, output_rows, extent_of(r + 2));
        break;
      default:
        multiply_rows<kAdd, kBlockRows>(a_rows, b, row_factors, output_rows,
                                        extent_of(r + kBlockRows - 1));
    }
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
