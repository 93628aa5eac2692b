#include "inference/checkpoint/packing.h"

#include <gtest/gtest.h>

#include <random>
#include <tuple>
#include <vector>

#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::checkpoint {
namespace {

TEST(Packing, StoresOffsetBinaryLowestBitsFirst) {
  const std::vector<std::int8_t> bytes = {-127, 0, 127, -128, 1};
  std::vector<std::uint32_t> words(2);
  pack_codes(bytes, 1, 5, 8, words);
  EXPECT_EQ(words, (std::vector<std::uint32_t>{0x00ff8001, 0x00000081}));

  const std::vector<std::int8_t> nibbles = {-8, 7, 0, -1};
  words.resize(1);
  pack_codes(nibbles, 1, 4, 4, words);
  EXPECT_EQ(words[0], 0x000078f0U);

  const std::vector<std::int8_t> bits = {0, -1, 0};
  pack_codes(bits, 1, 3, 1, words);
  EXPECT_EQ(words[0], 0b101U);
}

TEST(Packing, RowsStartAtWords) {
  const std::vector<std::int8_t> codes = {1, 1};
  std::vector<std::uint32_t> words(2);
  pack_codes(codes, 2, 1, 2, words);
  EXPECT_EQ(words, (std::vector<std::uint32_t>{3, 3}));
}

class PackingRoundTrip : public testing::TestWithParam<std::tuple<int, std::int64_t>> {};

TEST_P(PackingRoundTrip, UnpacksEveryRangeOfColumns) {
  const auto [num_bits, columns] = GetParam();
  constexpr std::int64_t kRows = 3;
  std::mt19937 random(static_cast<unsigned>(columns) * 10 + static_cast<unsigned>(num_bits));
  std::uniform_int_distribution<int> code(-(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1);
  std::vector<std::int8_t> codes(static_cast<std::size_t>(kRows * columns));
  for (std::int8_t& element : codes) {
    element = static_cast<std::int8_t>(code(random));
  }
  const std::int64_t row_words = packed_words(columns, num_bits);
  std::vector<std::uint32_t> words(static_cast<std::size_t>(kRows * row_words));
  pack_codes(codes, kRows, columns, num_bits, words);
  for (std::int64_t row = 0; row < kRows; ++row) {
    const auto bytes = std::as_bytes(std::span(words))
                           .subspan(static_cast<std::size_t>(row * row_words * 4),
                                    static_cast<std::size_t>(row_words * 4));
    for (const std::int64_t first : {std::int64_t{0}, columns / 3, columns - 1}) {
      std::vector<std::int8_t> unpacked(static_cast<std::size_t>(columns - first));
      unpack_codes(bytes, num_bits, first, unpacked);
      const auto begin = codes.begin() + row * columns;
      EXPECT_EQ(unpacked, std::vector<std::int8_t>(begin + first, begin + columns));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, PackingRoundTrip,
                         testing::Combine(testing::Values(1, 2, 4, 8),
                                          testing::Values(1, 7, 31, 32, 33, 576)));

TEST(Packing, RefusesACodeThatDoesNotFit) {
  const std::vector<std::int8_t> codes = {0, 8};
  std::vector<std::uint32_t> words(1);
  EXPECT_EQ(error_of([&] { pack_codes(codes, 1, 2, 4, words); }),
            "packing: a code of 4 bits must lie in [-8, 7], got 8 at [0, 1]");
}

TEST(Packing, RefusesWidthsAndSizesItCannotPack) {
  const std::vector<std::int8_t> codes(8);
  std::vector<std::uint32_t> words(1);
  EXPECT_THROW(pack_codes(codes, 1, 8, 3, words), Error);
  EXPECT_THROW(pack_codes(codes, 1, 8, 8, words), Error);
  EXPECT_THROW(packed_words(-1, 8), Error);
  EXPECT_THROW(packed_words(std::int64_t{1} << 61, 8), Error);
  std::vector<std::int8_t> columns(9);
  EXPECT_THROW(unpack_codes(std::as_bytes(std::span(words)), 4, 0, columns), Error);
}

}  // namespace
}  // namespace moq::checkpoint
