#pragma once

#include "kernels/fake_quantize.h"

/// What kernels/cpu/fake_quantize.cpp asks of each instruction set. The matrix that a function gets
/// is a range of a parameter's rows: its pointers and first_element belong to the first of them.
namespace moq::kernels::cpu {

/// What a call has besides the matrix.
struct FakeQuantizeStep {
  int num_bits;  ///< one that the matrix's mode has a grid of
  float blend_ratio;
  std::uint64_t seed;
  std::uint32_t step;
  bool stream;  ///< store outputs past the caches
  /// Of all rows, where they share their scale; then scales and zero points are not written.
  const GridParams* shared_grid;
};

#define MOQ_DECLARE_FAKE_QUANTIZE(ISA)                                                        \
  namespace ISA {                                                                             \
  /* Rows are contiguous (col_stride == 1). */                                                \
  void fake_quantize_rows(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step);    \
  /* Columns are contiguous (row_stride == 1). */                                             \
  void fake_quantize_columns(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step); \
  /* Statistics of all elements together; rows are contiguous. */                             \
  GroupStatistics matrix_statistics(const FakeQuantizeTensor& matrix);                        \
  /* What a sweep sums up over all elements; rows are contiguous. */                          \
  SweepSums matrix_sums(const FakeQuantizeTensor& matrix, const Sweep& sweep);                \
  /* output = input, converted; rows are contiguous. */                                       \
  void copy_rows(const FakeQuantizeTensor& matrix, bool stream);                              \
  }
MOQ_DECLARE_FAKE_QUANTIZE(scalar)
MOQ_DECLARE_FAKE_QUANTIZE(avx2)
MOQ_DECLARE_FAKE_QUANTIZE(avx512)
#undef MOQ_DECLARE_FAKE_QUANTIZE

}  // namespace moq::kernels::cpu
