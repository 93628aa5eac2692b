#include "csrc/hessian/solvers/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

namespace moq::hessian {
namespace {

std::vector<float> rademacher(std::size_t length, const RandomStream& stream) {
  std::vector<float> values(length);
  fill_rademacher(values, stream);
  return values;
}

class RademacherLength : public ::testing::TestWithParam<std::size_t> {};

TEST_P(RademacherLength, HoldsOnlySignsAndIsAPrefixOfALongerVector) {
  const RandomStream stream{.seed = 3};
  const std::vector<float> longer = rademacher(1024, stream);
  const std::vector<float> values = rademacher(GetParam(), stream);
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::abs(values[i]), 1.0F);
    EXPECT_EQ(values[i], longer[i]);
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, RademacherLength, ::testing::Values(0, 1, 127, 128, 129, 576));

TEST(Rademacher, IsTheSameInDoublePrecision) {
  const std::vector<float> values = rademacher(321, {.seed = 3});
  std::vector<double> wide(321);
  fill_rademacher(wide, {.seed = 3});
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(wide[i], values[i]);
  }
}

TEST(Rademacher, HasBothSignsEquallyOften) {
  const std::vector<float> values = rademacher(1 << 20, {.seed = 3});
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  EXPECT_LT(std::abs(sum), 5.0 * 1024.0);  // five standard deviations
}

TEST(Rademacher, EveryPartOfTheNameMakesAnotherVector) {
  const std::vector<float> values =
      rademacher(256, {.seed = 3, .tensor = 1, .probe = 2, .batch = 4});
  EXPECT_EQ(values, rademacher(256, {.seed = 3, .tensor = 1, .probe = 2, .batch = 4}));
  EXPECT_NE(values, rademacher(256, {.seed = 4, .tensor = 1, .probe = 2, .batch = 4}));
  EXPECT_NE(values, rademacher(256, {.seed = 3, .tensor = 2, .probe = 2, .batch = 4}));
  EXPECT_NE(values, rademacher(256, {.seed = 3, .tensor = 1, .probe = 3, .batch = 4}));
  EXPECT_NE(values, rademacher(256, {.seed = 3, .tensor = 1, .probe = 2, .batch = 5}));
}

TEST(Uniform, FillsTheHalfOpenIntervalWithMeanZero) {
  std::vector<double> values((1 << 16) + 1);
  fill_uniform<double>(values, {.seed = 3});
  for (const double value : values) {
    EXPECT_GE(value, -1.0);
    EXPECT_LT(value, 1.0);
  }
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / 65537.0;
  EXPECT_LT(std::abs(mean), 5.0 * std::sqrt(1.0 / 3.0 / 65537.0));
}

}  // namespace
}  // namespace moq::hessian
