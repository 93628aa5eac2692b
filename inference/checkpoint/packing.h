#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

/// The `pack-quantized` layout of compressed-tensors for widths that divide a word.
///
/// A code q of b bits is stored as the unsigned number q + 2^(b-1) (offset binary). Code j of a row
/// lies at bits [j * b, (j + 1) * b) of the row, counted from the lowest bit of its first word; the
/// unused bits of the last word are 0. Little-endian words make that byte j / (8 / b) of the row,
/// so that a range of columns is a range of bytes:
///
///     8 bits   | q0 | q1 | q2 | q3 |      4 bits   | q1 q0 | q3 q2 | …      one byte each
///
/// 3-, 5-, 6- and 7-bit codes are not packed: readers of different versions disagree about them.
namespace moq::checkpoint {

/// True for the widths that are packed: 1, 2, 4 and 8.
constexpr bool is_packable(int num_bits) {
  return num_bits == 1 || num_bits == 2 || num_bits == 4 || num_bits == 8;
}

/// Words of a packed row: ceil(columns * num_bits / 32).
/// @throws moq::Error for a width that is not packable, negative columns, or a size that overflows
std::int64_t packed_words(std::int64_t columns, int num_bits);

/// Packs a matrix of codes.
///
/// @param codes    [rows, columns], each in [-2^(num_bits-1), 2^(num_bits-1) - 1]
/// @param words    [rows, packed_words(columns, num_bits)], written
/// @throws moq::Error naming row, column and code if a code does not fit, or for sizes that do not
///         agree
void pack_codes(std::span<const std::int8_t> codes, std::int64_t rows, std::int64_t columns,
                int num_bits, std::span<std::uint32_t> words);

/// Unpacks columns [first_column, first_column + codes.size()) of one packed row.
///
/// @param row    bytes of the row as they lie in the file, without alignment
/// @param codes  written
/// @throws moq::Error if the row is shorter than the columns asked for
void unpack_codes(std::span<const std::byte> row, int num_bits, std::int64_t first_column,
                  std::span<std::int8_t> codes);

}  // namespace moq::checkpoint
