#pragma once

#include "kernels/fake_quantize.h"

/// What kernels/cpu/fake_quantize.cpp asks of each instruction set. The matrix that a function gets
/// is a range of a parameter's rows: its pointers and first_element belong to the first of them.
namespace moq::kernels::cpu {

/// What a call has besides the matrix.
struct FakeQuantizeStep {
  int num_bits;  ///< in [kMinBits, kMaxBits]
  float blend_ratio;
  std::uint64_t seed;
  std::uint32_t step;
  bool stream;  ///< store outputs past the caches
  /// Of the whole matrix, given when its granularity is per tensor; then scales and zero points are
  /// not written.
  const GroupStatistics* tensor_statistics;
};

#define MOQ_DECLARE_FAKE_QUANTIZE(ISA)                                                        \
  namespace ISA {                                                                             \
  /* Rows are contiguous (col_stride == 1). */                                                \
  void fake_quantize_rows(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step);    \
  /* Columns are contiguous (row_stride == 1). */                                             \
  void fake_quantize_columns(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step); \
  /* Statistics of all elements together; rows are contiguous. */                             \
  GroupStatistics matrix_statistics(const FakeQuantizeTensor& matrix);                        \
  /* output = input, converted; rows are contiguous. */                                       \
  void copy_rows(const FakeQuantizeTensor& matrix, bool stream);                              \
  }
MOQ_DECLARE_FAKE_QUANTIZE(scalar)
MOQ_DECLARE_FAKE_QUANTIZE(avx2)
MOQ_DECLARE_FAKE_QUANTIZE(avx512)
#undef MOQ_DECLARE_FAKE_QUANTIZE

}  // namespace moq::kernels::cpu
