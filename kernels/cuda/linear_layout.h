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
/// bytes, at 16 * l, of rows g = l / 4 and g + 8: lane_element says which. Of one- and two-byte
/// elements they are the A fragments of mma.m16n8k16 (and of wgmma) for columns in their natural
/// order, with t = l % 4:
/// - one byte: 8 of row g, then 8 of row g + 8, each of columns 2t, 2t + 1, 2t + 8 and 2t + 9 of
///   the first 16 columns, then of the second 16;
/// - two bytes: columns 2t and 2t + 1 of row g, then of row g + 8, then columns 2t + 8 and 2t + 9
///   of each. These are the four registers of a product, in their order;
/// - four bytes: columns 2t and 2t + 1 of row g, then of row g + 8.
/// So one 16-byte load of a lane feeds one or two products and nothing is shuffled.
///
/// Integer elements are stored as code + 128, unsigned. Rows and columns are padded to whole blocks
/// with elements that stand for zero.
namespace moq::kernels::cuda {

constexpr int kBlockRows = 16;
constexpr int kBlockBytes = 512;
constexpr int kPackedAlignment = 128;
constexpr int kLaneBytes = 16;

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

/// A place within a block.
struct BlockPlace {
  int row;
  int col;
};

/// Where element i of a lane's kLaneBytes is.
constexpr BlockPlace lane_element(int element_bytes, int lane, int i) {
  const int first_col = lane % 4 * 2 + i % 2;
  const int pair = i / 2;
  switch (element_bytes) {
    case 1:
      return {lane / 4 + pair / 4 * 8, first_col + pair % 2 * 8 + pair / 2 % 2 * 16};
    case 2:
      return {lane / 4 + pair % 2 * 8, first_col + pair / 2 * 8};
    default:
      return {lane / 4 + pair * 8, first_col};
  }
}

constexpr std::int64_t pad_to(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// @throws moq::Error for a shape that packed_linear_size refuses.
DeviceLayout device_layout(const LinearShape& shape);

}  // namespace moq::kernels::cuda
