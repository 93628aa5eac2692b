#include <numeric>

#include "kernels/cpu/simd/activation.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels::cpu {
namespace {

std::vector<float> exponentials(const std::vector<float>& x) {
  std::vector<float> result(x.size());
  MOQ_DISPATCH_ISA(relative_weights, x.data(), result.data(), static_cast<std::int64_t>(x.size()),
                   0.0F, 1.0F);
  return result;
}

TEST(ExponentialTest, IsWithinItsBound) {
  std::vector<float> x;
  for (float value = -87.3F; value < 88.7F; value += 0.00037F) {
    x.push_back(value);
  }
  const std::vector<float> result = exponentials(x);
  double worst = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    worst = std::max(worst, test::ulp_error(result[i], std::exp(static_cast<double>(x[i]))));
  }
  EXPECT_LE(worst, 1.1);
}

TEST(ExponentialTest, UnderflowsGraduallyAndOverflowsToInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> result =
      exponentials({-infinity, -1e30F, -104.0F, -100.0F, 0.0F, 88.72F, 88.73F, 1e30F, infinity});
  EXPECT_EQ(result[0], 0.0F);
  EXPECT_EQ(result[1], 0.0F);
  EXPECT_EQ(result[2], 0.0F);
  EXPECT_LE(test::ulp_error(result[3], std::exp(-100.0)), 1.0);
  EXPECT_EQ(result[4], 1.0F);
  EXPECT_LE(test::ulp_error(result[5], std::exp(static_cast<double>(88.72F))), 1.0);
  EXPECT_EQ(result[6], infinity);
  EXPECT_EQ(result[7], infinity);
  EXPECT_EQ(result[8], infinity);
}

TEST(ExponentialTest, KeepsNaN) {
  EXPECT_TRUE(std::isnan(exponentials({NAN})[0]));
}

class LargestSize : public ::testing::TestWithParam<std::int64_t> {};

TEST_P(LargestSize, FindsTheMaximumInEveryPlace) {
  std::vector<float> values = test::normal_vector(GetParam(), 1);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float before = std::exchange(values[i], 100.0F);
    ASSERT_EQ(MOQ_DISPATCH_ISA(largest, values.data(), GetParam()), 100.0F) << i;
    values[i] = NAN;
    ASSERT_TRUE(std::isnan(MOQ_DISPATCH_ISA(largest, values.data(), GetParam()))) << i;
    values[i] = before;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, LargestSize, ::testing::Values(1, 7, 16, 67));

}  // namespace
}  // namespace moq::kernels::cpu
