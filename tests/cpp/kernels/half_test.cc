#include "kernels/common/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace moq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::uint32_t bits_of(float value) {
  return std::bit_cast<std::uint32_t>(value);
}

// The compiler's own type is the oracle for float16; it has none for bfloat16 that GCC 12 computes
// with.
TEST(Half, EveryFloat16ReadsAsTheCompilersOwn) {
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const auto expected = static_cast<float>(std::bit_cast<_Float16>(half));
    ASSERT_EQ(bits_of(float16_to_float(half)), bits_of(expected)) << "bits " << bits;
  }
}

// Where rounding decides: every float16, the midpoint to the next one, and their float32
// neighbours.
TEST(Half, RoundsToFloat16AsTheCompilerDoesAroundEveryValueAndMidpoint) {
  for (std::uint32_t bits = 0; bits < 0xffffU; ++bits) {
    const float value = float16_to_float(static_cast<std::uint16_t>(bits));
    const float next = float16_to_float(static_cast<std::uint16_t>(bits + 1));
    for (const float center : {value, value + (next - value) * 0.5F}) {
      for (const float x :
           {std::nextafterf(center, -kInfinity), center, std::nextafterf(center, kInfinity)}) {
        if (std::isnan(x)) continue;
        const auto expected = std::bit_cast<std::uint16_t>(static_cast<_Float16>(x));
        ASSERT_EQ(float_to_float16(x), expected) << "x = " << x;
      }
    }
  }
}

TEST(Half, Float16OverflowsToInfinityFrom65520) {
  EXPECT_EQ(float_to_float16(65519.996F), 0x7bffU);
  EXPECT_EQ(float_to_float16(65520.0F), 0x7c00U);
  EXPECT_EQ(float_to_float16(-1e30F), 0xfc00U);
}

TEST(Half, EveryBFloat16SurvivesTheWayThroughFloat32) {
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const float value = bfloat16_to_float(static_cast<std::uint16_t>(bits));
    ASSERT_EQ(bits_of(value), bits << 16);
    const std::uint32_t expected = std::isnan(value) ? bits | 0x40U : bits;  // NaN: made quiet
    ASSERT_EQ(float_to_bfloat16(value), expected);
  }
}

TEST(Half, RoundsToBFloat16HalfToEvenAroundEveryMidpoint) {
  for (std::uint32_t bits = 0; bits < 0x7f80U; ++bits) {
    const std::uint32_t midpoint = (bits << 16) | 0x8000U;
    const std::uint32_t even = bits + (bits & 1U);
    ASSERT_EQ(float_to_bfloat16(std::bit_cast<float>(midpoint - 1)), bits);
    ASSERT_EQ(float_to_bfloat16(std::bit_cast<float>(midpoint)), even);
    ASSERT_EQ(float_to_bfloat16(std::bit_cast<float>(midpoint + 1)), bits + 1);
    ASSERT_EQ(float_to_bfloat16(std::bit_cast<float>(midpoint | 0x80000000U)), even | 0x8000U);
  }
}

TEST(Half, ANaNStaysAQuietNaNWhateverItsPayload) {
  for (const std::uint32_t bits : {0x7f800001U, 0x7fc00000U, 0xff802000U, 0xffffffffU}) {
    const float nan = std::bit_cast<float>(bits);
    EXPECT_EQ(float_to_float16(nan) & 0x7e00U, 0x7e00U);
    EXPECT_EQ(float_to_float16(nan) >> 15, bits >> 31);
    EXPECT_EQ(float_to_bfloat16(nan) & 0x7fc0U, 0x7fc0U);
    EXPECT_EQ(float_to_bfloat16(nan) >> 15, bits >> 31);
  }
}

TEST(Half, RoundToKeepsANumberOfTheDType) {
  EXPECT_EQ(round_to(1.0F + 0x1p-12F, DType::kFloat16), 1.0F);
  EXPECT_EQ(round_to(1.0F + 0x1p-10F, DType::kFloat16), 1.0F + 0x1p-10F);
  EXPECT_EQ(round_to(1.0F + 0x1p-9F, DType::kBFloat16), 1.0F);
  EXPECT_EQ(round_to(1.0F + 0x1p-23F, DType::kFloat32), 1.0F + 0x1p-23F);
}

}  // namespace
}  // namespace moq
