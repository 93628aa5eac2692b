#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <span>
#include <vector>

/// What the tests of the float kernels share: data, and the rule by which they accept a result.
namespace moq::test {

inline std::vector<float> normal_vector(std::int64_t size, unsigned seed, float deviation = 1.0F) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0F, deviation);
  std::vector<float> values(static_cast<std::size_t>(size));
  std::generate(values.begin(), values.end(), [&] { return distribution(generator); });
  return values;
}

template <typename Number>
double max_error(std::span<const Number> values, std::span<const double> exact) {
  double error = 0.0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    error = std::max(error, std::fabs(static_cast<double>(values[i]) - exact[i]));
  }
  return error;
}

/// `actual` may be twice as far from `exact` as the naive float32 computation of the same formula.
/// Where that happens to be (nearly) exact, the largest value may be rounded once on top.
inline void expect_accurate(std::span<const float> actual, std::span<const float> naive,
                            std::span<const double> exact) {
  ASSERT_EQ(actual.size(), exact.size());
  double largest = 0.0;
  for (const double value : exact) {
    largest = std::max(largest, std::fabs(value));
  }
  for (const float value : actual) {
    ASSERT_FALSE(std::isnan(value));
  }
  EXPECT_LE(max_error(actual, exact), 2.0 * max_error(naive, exact) + largest * 0x1p-24);
}

/// Distance from the exact value in units of the last place that a float32 of its size has.
inline double ulp_error(float actual, double exact) {
  const int exponent = std::max(std::ilogb(exact), -126);
  return std::fabs(static_cast<double>(actual) - exact) / std::ldexp(1.0, exponent - 23);
}

}  // namespace moq::test
