#pragma once

#include <cstdint>

#include "kernels/cpu/linear_layout.h"

/// What linear.cpp asks of each instruction set.
///
/// For an integer weight the input is split into digits, narrow integers whose dot products with
/// 8-bit elements have an instruction:
///
///   x = Σ_d base^d * digit_d,   base = 2^8 (avx512: vpdpbusd) or 2^11 (the others: 16-bit
///   products)
///
/// and the dot product of x is put together from those of its digits. An INT8 input is one digit. A
/// vector is one digit of one row, a tile the vectors whose sums a kernel keeps in registers.
///
/// An INT8 input with a zero point, x = code - zero_point, has one bit more. Where a digit has not,
/// it holds the code, and a tile has one more vector, of ones, whose dot product zero_point times
/// is what the codes' one has too much.
namespace moq::kernels::cpu {

/// Two runs of memory to ask for during a dot product: `step` bytes on with each block.
struct Prefetch {
  const std::uint8_t* first;
  const std::uint8_t* second;
  std::int64_t step;
};

/// How an instruction set arranges the input of an integer weight.
struct DigitFormat {
  std::int64_t digits;       ///< vectors of a row
  std::int64_t ones;         ///< vectors of ones of a tile: 0 or 1
  std::int64_t digit_bytes;  ///< bytes of one digit
  std::int64_t tile_rows;    ///< most rows of a tile
};

/// The first row of a tile when `rows` rows are cut into `tiles` tiles of about the same size.
[[gnu::always_inline]] inline std::int64_t tile_begin(std::int64_t tile, std::int64_t rows,
                                                      std::int64_t tiles) {
  return tile * rows / tiles;
}

/// A part of the product of a batch and a weight.
struct Part {
  std::int64_t first_tile;
  std::int64_t last_tile;  ///< one past it, as everywhere
  std::int64_t first_panel;
  std::int64_t last_panel;
};

/// Input rows as digits: tiles of [padded columns / 4, vectors, 4 columns], one after the other.
struct DigitRows {
  std::uint8_t* digits;
  double* sums;   ///< [rows, pieces]: Σ x over the columns of a piece
  double* units;  ///< [rows]: the real value of x = 1; NaN: the row has no finite result
  std::int32_t* zero_points;  ///< [rows]: digit - x, where tiles have ones
};

/// One tile of rows to split.
struct SplitArgs {
  const float* input;  ///< [rows, k]
  std::int64_t input_stride;
  std::int64_t rows;
  InputRounding rounding;
  /// Of dynamic modes: the rows' largest magnitudes below and above 0, or null twice. Symmetric:
  /// the same.
  const float* input_below;
  const float* input_above;
  DigitRows output;  ///< where this tile's go
};

/// Where the results of a batch of rows go; each pointer is that of the batch's first row.
struct OutputRows {
  std::int64_t rows;
  std::int64_t tiles;  ///< that the rows are cut into
  std::int64_t n;
  const float* bias;      ///< [n] or null
  const float* residual;  ///< [rows, n] or null
  std::int64_t residual_stride;
  float* output;  ///< [rows, n]
  std::int64_t output_stride;
};

/// A batch of rows, integer weight.
struct IntegerMultiplyArgs {
  DigitRows input;
  InputMode mode;
  const std::uint8_t* weight;
  OutputRows output;
};

/// A batch of rows, float weight.
struct FloatMultiplyArgs {
  const float* input;  ///< tiles of [k, rows of the tile], one after the other
  WeightFormat format;
  const void* weight;
  std::int64_t k;
  OutputRows output;
};

#define MOQ_DECLARE_LINEAR_KERNELS(isa)                                                \
  namespace isa {                                                                      \
  DigitFormat digit_format(InputMode mode);                                            \
  void split_rows(const SplitArgs& args, const IntegerLayout& layout);                 \
  void multiply_integers(const IntegerMultiplyArgs& args, const IntegerLayout& layout, \
                         const Part& part);                                            \
  std::int64_t float_tile_rows();                                                      \
  void multiply_floats(const FloatMultiplyArgs& args, const Part& part);               \
  }
MOQ_DECLARE_LINEAR_KERNELS(scalar)
MOQ_DECLARE_LINEAR_KERNELS(avx2)
MOQ_DECLARE_LINEAR_KERNELS(avx512)
#undef MOQ_DECLARE_LINEAR_KERNELS

}  // namespace moq::kernels::cpu
