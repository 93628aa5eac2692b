#include "inference/checkpoint/packing.h"

#include <algorithm>
#include <limits>

#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

void check_packable(int num_bits) {
  MOQ_CHECK(is_packable(num_bits), "packing: num_bits must be 1, 2, 4 or 8, got ", num_bits);
}

// The width is a template parameter so that no code costs a division.
template <int kBits>
void unpack(std::span<const std::byte> row, std::int64_t first_column,
            std::span<std::int8_t> codes) {
  constexpr std::size_t kPerByte = 8 / kBits;
  auto column = static_cast<std::size_t>(first_column);
  for (std::int8_t& code : codes) {
    const auto byte = std::to_integer<unsigned>(row[column / kPerByte]);
    const unsigned bits = (byte >> (column % kPerByte * kBits)) & ((1U << kBits) - 1U);
    code = static_cast<std::int8_t>(static_cast<int>(bits) - (1 << (kBits - 1)));
    ++column;
  }
}

}  // namespace

std::int64_t packed_words(std::int64_t columns, int num_bits) {
  check_packable(num_bits);
  MOQ_CHECK(columns >= 0 && columns <= std::numeric_limits<std::int64_t>::max() / 8 - 32,
            "packing: columns must lie in [0, 2^60), got ", columns);
  return (columns * num_bits + 31) / 32;
}

void pack_codes(std::span<const std::int8_t> codes, std::int64_t rows, std::int64_t columns,
                int num_bits, std::span<std::uint32_t> words) {
  const std::int64_t row_words = packed_words(columns, num_bits);
  MOQ_CHECK(rows >= 0 && static_cast<std::int64_t>(codes.size()) == rows * columns &&
                static_cast<std::int64_t>(words.size()) == rows * row_words,
            "packing: codes and words must hold ", rows, " rows of ", columns, " codes and ",
            row_words, " words, got ", codes.size(), " and ", words.size());
  const int offset = 1 << (num_bits - 1);
  const std::int64_t per_word = 32 / num_bits;
  std::fill(words.begin(), words.end(), 0U);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int8_t* source = codes.data() + row * columns;
    std::uint32_t* target = words.data() + row * row_words;
    for (std::int64_t column = 0; column < columns; ++column) {
      const auto code = static_cast<int>(source[column]);
      MOQ_CHECK(code >= -offset && code < offset, "packing: a code of ", num_bits,
                " bits must lie in [", -offset, ", ", offset - 1, "], got ", code, " at [", row,
                ", ", column, "]");
      const auto bits = static_cast<std::uint32_t>(code + offset);
      target[column / per_word] |= bits << (column % per_word * num_bits);
    }
  }
}

void unpack_codes(std::span<const std::byte> row, int num_bits, std::int64_t first_column,
                  std::span<std::int8_t> codes) {
  const auto count = static_cast<std::int64_t>(codes.size());
  MOQ_CHECK(first_column >= 0 && packed_words(first_column + count, num_bits) * 4 <=
                                     static_cast<std::int64_t>(row.size()),
            "packing: a row of ", row.size(), " bytes must hold columns up to ",
            first_column + count, " at ", num_bits, " bits");
  switch (num_bits) {
    case 1:
      return unpack<1>(row, first_column, codes);
    case 2:
      return unpack<2>(row, first_column, codes);
    case 4:
      return unpack<4>(row, first_column, codes);
    default:
      return unpack<8>(row, first_column, codes);
  }
}

}  // namespace moq::checkpoint
