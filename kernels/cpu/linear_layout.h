#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/linear.h"

/// The packed weight. Rows are dealt to panels of 32; a panel is one run of memory, read front to
/// back by one thread:
///
///   integers   for each group: its blocks | for each group: 32 scales | for each group: 32 bases
///   floats     for each column: 32 values
///
/// A block holds 32 rows x 4 (8-bit), 8 (4-bit) or 16 (2-bit) columns in 128 bytes. Byte 4 * row +
/// i holds the elements of columns i, i + 4, … of that row, first column in the lowest bits: the
/// operand of a 4-way dot product is 64 bytes of a block, shifted and masked for the narrow widths.
/// Elements are stored as code + 2^(bits - 1), unsigned. The base of a row is the stored element
/// that stands for zero, 2^(bits - 1) + zero_point; bases are stored only when asymmetric. Groups
/// are padded to whole blocks and the last panel to 32 rows.
namespace moq::kernels::cpu {

constexpr std::int64_t kPanelRows = 32;
constexpr std::int64_t kBlockBytes = 128;
/// Columns of one dot product step, whatever the width.
constexpr std::int64_t kStepCols = 4;
/// Columns after which integer sums are taken out of 32-bit accumulators: 8192 products of an
/// element (< 2^8) and a digit of the input (at most 11 bits) stay below 2^31.
constexpr std::int64_t kPieceCols = 8192;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// Where things are in a packed integer weight.
struct IntegerLayout {
  std::int64_t bits;
  std::int64_t groups;
  std::int64_t group_size;        ///< columns
  std::int64_t blocks_per_group;  ///< ceil(group_size / columns of a block)
  std::int64_t panels;
  std::int64_t panel_bytes;

  explicit IntegerLayout(const LinearShape& shape)
      : bits(bits_of(shape.format)),
        groups(num_groups(shape)),
        group_size(shape.group_size),
        blocks_per_group(divide_up(shape.group_size, block_cols())),
        panels(divide_up(shape.n, kPanelRows)),
        panel_bytes(groups * (blocks_per_group * kBlockBytes +
                              kPanelRows * std::int64_t{4} * (shape.asymmetric ? 2 : 1))) {}

  std::int64_t block_cols() const { return kStepCols * (8 / bits); }
  std::int64_t offset() const { return std::int64_t{1} << (bits - 1); }
  /// Columns of a row of the input once every group is padded to whole blocks.
  std::int64_t padded_cols() const { return groups * blocks_per_group * block_cols(); }
  std::int64_t scales_offset() const { return groups * blocks_per_group * kBlockBytes; }
  std::int64_t bases_offset() const { return scales_offset() + groups * kPanelRows * 4; }
};

}  // namespace moq::kernels::cpu
