#include "kernels/quant_grid.h"

#include <gtest/gtest.h>

#include <limits>
#include <tuple>

namespace moq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::int32_t nearest(float value, const GridParams& grid) {
  return quantize_one(value, grid, Rounding::kNearest, 0.0F);
}

GroupStatistics asymmetric_group(float lo, float hi) {
  return {ordered_bits(std::bit_cast<std::int32_t>(lo)),
          ordered_bits(std::bit_cast<std::int32_t>(hi))};
}

using Width = std::tuple<int, DType>;

class QuantGridEveryWidth : public testing::TestWithParam<Width> {
 protected:
  int num_bits() const { return std::get<0>(GetParam()); }
  DType scale_dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(QuantGridEveryWidth, SymmetricGridIsNarrowAndCentred) {
  const GridRange range = grid_range(num_bits(), QuantMode::kSymmetric);
  EXPECT_EQ(range.qmax, (1 << (num_bits() - 1)) - 1);
  EXPECT_EQ(range.qmin, -range.qmax);
}

TEST_P(QuantGridEveryWidth, MapsAbsMaxOntoTheEndOfTheGrid) {
  // Up to the scale's own rounding: a step of bfloat16 is 2^-8, so the last codes are lost to wide
  // grids.
  const GridParams grid = make_grid(-3.7F, 7.31F, num_bits(), QuantMode::kSymmetric, scale_dtype());
  const float rounding = scale_dtype() == DType::kBFloat16 ? 0x1p-8F : 0x1p-10F;
  EXPECT_GE(nearest(7.31F, grid), std::floor(grid.range.qmax * (1.0F - rounding)));
  EXPECT_EQ(nearest(-7.31F, grid), -nearest(7.31F, grid));
  EXPECT_EQ(nearest(-100.0F, grid), grid.range.qmin);
}

TEST_P(QuantGridEveryWidth, ScaleIsANumberOfItsDType) {
  for (const QuantMode mode : {QuantMode::kSymmetric, QuantMode::kAsymmetric}) {
    const GridParams grid = make_grid(-3.7F, 7.31F, num_bits(), mode, scale_dtype());
    EXPECT_EQ(round_to(grid.scale, scale_dtype()), grid.scale);
  }
}

TEST_P(QuantGridEveryWidth, ZeroIsOnTheAsymmetricGrid) {
  for (const auto& [lo, hi] : {std::pair{-3.7F, 7.31F}, {0.2F, 0.9F}, {-5.0F, -1.0F}}) {
    const GridParams grid = make_grid(lo, hi, num_bits(), QuantMode::kAsymmetric, scale_dtype());
    EXPECT_EQ(nearest(0.0F, grid), grid.zero_point);
    EXPECT_EQ(dequantize_one(grid.zero_point, grid), 0.0F);
    EXPECT_GE(grid.zero_point, grid.range.qmin);
    EXPECT_LE(grid.zero_point, grid.range.qmax);
  }
}

TEST_P(QuantGridEveryWidth, DequantizedCodesQuantizeToThemselves) {
  for (const QuantMode mode : {QuantMode::kSymmetric, QuantMode::kAsymmetric}) {
    const GridParams grid = make_grid(-3.7F, 7.31F, num_bits(), mode, scale_dtype());
    for (std::int32_t code = grid.range.qmin; code <= grid.range.qmax; ++code) {
      ASSERT_EQ(nearest(dequantize_one(code, grid), grid), code);
    }
  }
}

TEST_P(QuantGridEveryWidth, AnAllZeroGroupGetsTheSmallestScaleAndCodesZero) {
  const GridParams grid =
      make_grid(GroupStatistics{}, num_bits(), QuantMode::kSymmetric, scale_dtype());
  EXPECT_EQ(grid.scale, min_scale(scale_dtype()));
  EXPECT_EQ(nearest(0.0F, grid), 0);
  EXPECT_EQ(dequantize_one(0, grid), 0.0F);
}

INSTANTIATE_TEST_SUITE_P(All, QuantGridEveryWidth,
                         testing::Combine(testing::Values(2, 3, 4, 5, 8, 11, 16),
                                          testing::Values(DType::kFloat32, DType::kFloat16,
                                                          DType::kBFloat16)),
                         [](const testing::TestParamInfo<Width>& info) {
                           return name_of(std::get<1>(info.param)) + std::string("_") +
                                  std::to_string(std::get<0>(info.param)) + "bit";
                         });

TEST(QuantGrid, NearestRoundsHalfToEven) {
  const GridParams grid{1.0F, 1.0F, 0, grid_range(8, QuantMode::kSymmetric)};
  EXPECT_EQ(nearest(0.5F, grid), 0);
  EXPECT_EQ(nearest(1.5F, grid), 2);
  EXPECT_EQ(nearest(2.5F, grid), 2);
  EXPECT_EQ(nearest(-0.5F, grid), 0);
  EXPECT_EQ(nearest(-1.5F, grid), -2);
}

TEST(QuantGrid, StochasticRoundsUpExactlyWhenTheUniformReachesTheNextGridPoint) {
  const GridParams grid{1.0F, 1.0F, 0, grid_range(8, QuantMode::kSymmetric)};
  EXPECT_EQ(quantize_one(2.25F, grid, Rounding::kStochastic, 0.75F - 0x1p-16F), 2);
  EXPECT_EQ(quantize_one(2.25F, grid, Rounding::kStochastic, 0.75F), 3);
  EXPECT_EQ(quantize_one(-2.25F, grid, Rounding::kStochastic, 0.25F - 0x1p-16F), -3);
  EXPECT_EQ(quantize_one(-2.25F, grid, Rounding::kStochastic, 0.25F), -2);
}

TEST(QuantGrid, StochasticAddsTheUniformExactly) {
  const GridParams grid{1.0F, 1.0F, 0, grid_range(16, QuantMode::kSymmetric)};
  EXPECT_EQ(quantize_one(-1e-30F, grid, Rounding::kStochastic, 0.0F), -1);
  EXPECT_EQ(quantize_one(-1e-30F, grid, Rounding::kStochastic, 0x1p-16F), 0);
  EXPECT_EQ(quantize_one(1e-30F, grid, Rounding::kStochastic, 1.0F - 0x1p-16F), 0);
  EXPECT_EQ(quantize_one(0x1p-16F, grid, Rounding::kStochastic, 1.0F - 0x1p-16F), 1);
  EXPECT_EQ(quantize_one(0x1.fffffep-17F, grid, Rounding::kStochastic, 1.0F - 0x1p-16F), 0);
  EXPECT_EQ(quantize_one(30000.5F, grid, Rounding::kStochastic, 0.5F - 0x1p-16F), 30000);
  EXPECT_EQ(quantize_one(30000.5F, grid, Rounding::kStochastic, 0.5F), 30001);
}

TEST(QuantGrid, StochasticKeepsGridPointsForEveryUniform) {
  const GridParams grid{1.0F, 1.0F, 0, grid_range(8, QuantMode::kSymmetric)};
  EXPECT_EQ(quantize_one(5.0F, grid, Rounding::kStochastic, 0.0F), 5);
  EXPECT_EQ(quantize_one(5.0F, grid, Rounding::kStochastic, 1.0F - 0x1p-16F), 5);
  EXPECT_EQ(quantize_one(127.0F, grid, Rounding::kStochastic, 0.0F), 127);
}

TEST(QuantGrid, AGroupTooSmallForTheScaleDTypeDoesNotDivideByZero) {
  const GridParams grid = make_grid(-1e-8F, 1e-8F, 8, QuantMode::kSymmetric, DType::kFloat16);
  EXPECT_EQ(grid.scale, 0x1p-14F);
  EXPECT_EQ(nearest(1e-8F, grid), 0);
}

TEST(QuantGrid, AGroupTooLargeForTheScaleDTypeIsClampedToTheEnds) {
  const GridParams half = make_grid(-1e9F, 1e9F, 8, QuantMode::kSymmetric, DType::kFloat16);
  EXPECT_EQ(half.scale, 65504.0F);
  EXPECT_EQ(nearest(1e9F, half), 127);
  const GridParams wide = make_grid(-3e38F, 3e38F, 8, QuantMode::kAsymmetric, DType::kFloat32);
  EXPECT_EQ(wide.scale, std::numeric_limits<float>::max());
}

TEST(QuantGrid, SubnormalWeightsQuantizeToZeroWithoutOverflow) {
  const float tiny = std::numeric_limits<float>::denorm_min();
  const GridParams grid = make_grid(-tiny, tiny, 8, QuantMode::kSymmetric, DType::kFloat32);
  EXPECT_EQ(grid.scale, 0x1p-126F);
  EXPECT_TRUE(std::isfinite(grid.inverse_scale));
  EXPECT_EQ(nearest(tiny, grid), 0);
}

TEST(QuantGrid, OrderedBitsOrderNumbersAndKeepNaNsOutsideTheInfinities) {
  const float ascending[] = {-kNaN,  -kInfinity, -1.0F,     -1e-40F, 0.0F,
                             1e-40F, 1.0F,       kInfinity, kNaN};
  for (int i = 0; i + 1 < 9; ++i) {
    EXPECT_LT(ordered_bits(std::bit_cast<std::int32_t>(ascending[i])),
              ordered_bits(std::bit_cast<std::int32_t>(ascending[i + 1])));
  }
  const auto bits = std::bit_cast<std::int32_t>(-1.25F);
  EXPECT_EQ(ordered_bits(ordered_bits(bits)), bits);
}

TEST(QuantGrid, ANonFiniteElementLeavesTheGroupWithoutAGrid) {
  for (const float bad : {kInfinity, kNaN}) {
    EXPECT_TRUE(has_nonfinite(asymmetric_group(-1.0F, bad)));
    EXPECT_TRUE(has_nonfinite(asymmetric_group(-bad, 1.0F)));
    const GridParams grid =
        make_grid(asymmetric_group(-1.0F, bad), 8, QuantMode::kAsymmetric, DType::kFloat32);
    EXPECT_TRUE(std::isnan(grid.scale));
    EXPECT_TRUE(std::isnan(dequantize_one(0, grid)));
  }
  EXPECT_FALSE(has_nonfinite(asymmetric_group(-3e38F, 3e38F)));
}

}  // namespace
}  // namespace moq
