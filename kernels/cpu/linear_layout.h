#pragma once

#include <cstdint>

#include "kernels/linear.h"

/// The packed weight. Rows are dealt to panels of 32; a panel is one run of memory, read front to
/// back by one thread:
///
///   integers   for each group: its blocks | for each group: 32 scales | for each group: 32 bases
///   floats     for each column: 32 values
///
/// A block holds 32 rows x 4 (8-bit), 8 (4-bit) or 16 (2-bit) columns in 128 bytes. Byte 4 * row +
/// i holds the elements of columns i, i + 4, … of that row, the first of them in the lowest bits:
/// shifted and masked, a block is the operand of one 4-way dot product after the other. Elements
/// are stored as code + 2^(bits - 1), unsigned. The base of a row is the stored element that stands
/// for zero, 2^(bits - 1) + zero_point; bases are there only when asymmetric. Groups are padded to
/// whole blocks and the last panel to 32 rows.
namespace moq::kernels::cpu {

constexpr std::int64_t kPackedAlignment = 64;
constexpr std::int64_t kPanelRows = 32;
constexpr std::int64_t kBlockBytes = 128;
/// Columns of one step of dot products, whatever the width.
constexpr std::int64_t kStepCols = 4;
/// Columns after which integer sums leave their 32-bit accumulators: 8192 products of an element
/// (< 2^8) and a digit of the input (at most 11 bits with its sign) stay below 2^31.
constexpr std::int64_t kPieceCols = 8192;

/// Where things are in a packed integer weight. Plain data: files compiled for one instruction set
/// must not share functions with others.
struct IntegerLayout {
  std::int64_t bits;
  std::int64_t offset;  ///< what is added to a code: 2^(bits - 1)
  std::int64_t groups;
  std::int64_t group_size;        ///< columns
  std::int64_t block_cols;        ///< columns of a block
  std::int64_t blocks_per_group;  ///< ceil(group_size / block_cols)
  std::int64_t piece_blocks;      ///< kPieceCols / block_cols
  std::int64_t pieces;            ///< of a row: groups * ceil(blocks_per_group / piece_blocks)
  std::int64_t padded_cols;       ///< of a row, every group padded to whole blocks
  std::int64_t panels;
  std::int64_t panel_bytes;
  std::int64_t scales_offset;  ///< bytes from the start of a panel
  std::int64_t bases_offset;
  bool asymmetric;
};

/// @throws moq::Error, naming `where`, if a packed weight is null or not aligned.
void check_packed(const char* where, const void* data);

/// The layout of an integer weight with k > 0.
IntegerLayout integer_layout(const LinearShape& shape);

}  // namespace moq::kernels::cpu
