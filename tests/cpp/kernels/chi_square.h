#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

namespace moq::test {

/// Tokens are drawn as often as their probability says, and never those without any: chi-square at
/// the quantile 1 - 1e-4 of the normal approximation by Wilson and Hilferty.
inline void expect_drawn_as_often(std::span<const int> counts, std::span<const float> probabilities,
                                  int draws) {
  double statistic = 0.0;
  int degrees = -1;
  double rare_expected = 0.0;  // cells below 5 expected draws are put together
  int rare_count = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = draws * static_cast<double>(probabilities[i]);
    if (probabilities[i] == 0.0F) {
      ASSERT_EQ(counts[i], 0) << i;
    } else if (expected < 5.0) {
      rare_expected += expected;
      rare_count += counts[i];
    } else {
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
      ++degrees;
    }
  }
  if (rare_expected > 0.0) {
    statistic += (rare_count - rare_expected) * (rare_count - rare_expected) / rare_expected;
    ++degrees;
  }
  if (degrees > 0) {
    const double spread = 2.0 / (9.0 * degrees);
    const double bound = degrees * std::pow(1.0 - spread + 3.719 * std::sqrt(spread), 3);
    EXPECT_LT(statistic, bound) << degrees << " degrees of freedom";
  } else {
    EXPECT_EQ(rare_count + *std::max_element(counts.begin(), counts.end()), draws);
  }
}

}  // namespace moq::test
