#pragma once

#include <cstdint>

#include "kernels/linear.h"

/// A packed weight on a GPU: blocks of 16 rows and 512 bytes, those of 16 rows one after the other,
/// then the scales, then the zero points.
///
///   blocks       [row blocks][column blocks][512 bytes]
///   scales       [row blocks][groups][16 rows] float32                       integer formats
///   zero points  [row blocks][groups][16 rows] float32                       asymmetric ones
///
/// A block has 32 columns of one byte, 16 of two or 8 of four. Lane l of a warp owns 16 of its
/// bytes, at 16 * l: with g = l / 4 and t = l % 4, 8 bytes of columns from 8 / size * t on of row
/// g, then those of row g + 8. That is the A fragment of mma.m16n8k16 up to an order of the columns
/// that the B fragment can follow (its own 4 or 8 neighbouring columns), so one 16-byte load
/// of a lane feeds one or two products and nothing is shuffled.
///
/// Integer elements are stored as code + 128, unsigned. Rows and columns are padded to whole blocks
/// with elements that stand for zero.
namespace moq::kernels::cuda {

constexpr int kBlockRows = 16;
constexpr int kBlockBytes = 512;
constexpr int kPackedAlignment = 128;
constexpr int kLaneRunBytes = 8;  ///< of one row

/// Where things are in a packed weight. Plain data, passed to kernels by value.
struct DeviceLayout {
  std::int64_t n;
  std::int64_t k;
  std::int64_t row_blocks;
  std::int64_t col_blocks;
  std::int64_t groups;  ///< scales of a row; 0 for float formats
  std::int64_t group_size;
  std::int64_t scales_offset;  ///< bytes
  std::int64_t zero_points_offset;
  std::int64_t bytes;
  std::int32_t element_bytes;
  std::int32_t block_cols;
  bool asymmetric;
};

constexpr std::int64_t pad_to(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// @throws moq::Error for a shape that packed_linear_size refuses.
DeviceLayout device_layout(const LinearShape& shape);

}  // namespace moq::kernels::cuda
