#include "kernels/common/philox.h"

#include <gtest/gtest.h>

namespace moq {
namespace {

// The three vectors of the authors' kat_vectors file (Random123 1.14) for philox4x32, 10 rounds.
TEST(Philox, GivesThePublishedBlockForZeros) {
  constexpr PhiloxBlock kBlock = philox4x32({{0, 0, 0, 0}}, 0);
  EXPECT_EQ(kBlock, (PhiloxBlock{{0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U}}));
}

TEST(Philox, GivesThePublishedBlockForOnes) {
  constexpr std::uint32_t kOnes = 0xffffffffU;
  const PhiloxBlock block = philox4x32({{kOnes, kOnes, kOnes, kOnes}}, 0xffffffffffffffffU);
  EXPECT_EQ(block, (PhiloxBlock{{0x408f276dU, 0x41c83b0eU, 0xa20bc7c6U, 0x6d5451fdU}}));
}

TEST(Philox, GivesThePublishedBlockForTheDigitsOfPi) {
  const PhiloxBlock counter{{0x243f6a88U, 0x85a308d3U, 0x13198a2eU, 0x03707344U}};
  const PhiloxBlock block = philox4x32(counter, 0x299f31d0a4093822U);
  EXPECT_EQ(block, (PhiloxBlock{{0xd16cfe09U, 0x94fdccebU, 0x5001e420U, 0x24126ea1U}}));
}

TEST(Philox, ABlockFromItsStartIsTheBlock) {
  const PhiloxKeys keys = philox_keys(0x299f31d0a4093822U);
  const PhiloxStart start = philox_start(0x85a308d3U, 0x13198a2eU, 0x03707344U, keys);
  EXPECT_EQ(philox4x32(0x243f6a88U, start, keys),
            (PhiloxBlock{{0xd16cfe09U, 0x94fdccebU, 0x5001e420U, 0x24126ea1U}}));
}

TEST(Philox, HalvesOfABlockFollowEachOtherAsInMemory) {
  constexpr PhiloxBlock kBlock{{0x00020001U, 0x00040003U, 0x00060005U, 0xffff0007U}};
  for (int i = 0; i < 7; ++i) {
    EXPECT_EQ(half_of(kBlock, i), static_cast<std::uint32_t>(i + 1));
  }
  EXPECT_EQ(half_of(kBlock, 7), 0xffffU);
}

TEST(Philox, UniformsFillTheHalfOpenUnitInterval) {
  EXPECT_EQ(uniform_from_word(0), 0.0F);
  EXPECT_EQ(uniform_from_word(0xffU), 0.0F);
  EXPECT_EQ(uniform_from_word(0x100U), 0x1p-24F);
  EXPECT_EQ(uniform_from_word(0xffffffffU), 1.0F - 0x1p-24F);
}

}  // namespace
}  // namespace moq
