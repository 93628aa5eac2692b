#include "csrc/hessian/solvers/eigen_solvers.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/hessian/known_spectrum.h"

namespace moq::hessian {
namespace {

template <typename Scalar>
double residual(const Matrix<Scalar>& a, const EigenPair<Scalar>& pair) {
  const auto v = Eigen::Map<const Vector<Scalar>>(pair.vector.data(), a.rows());
  const Matrix<double> exact = a.template cast<double>();
  const Vector<double> x = v.template cast<double>();
  return (exact * x - pair.value * x).norm();
}

struct Spectrum {
  const char* name;
  std::vector<double> values;
  int products;  ///< within which the dominant pair must converge to 1e-6
};

class KnownSpectrum : public ::testing::TestWithParam<Spectrum> {
 protected:
  double largest() const {
    return *std::max_element(GetParam().values.begin(), GetParam().values.end());
  }
  double smallest() const {
    return *std::min_element(GetParam().values.begin(), GetParam().values.end());
  }
  double dominant() const { return largest() >= -smallest() ? largest() : smallest(); }
};

TEST_P(KnownSpectrum, LanczosSatisfiesTheDefiningEquation) {
  const Matrix<double> a = matrix_with<double>(GetParam().values);
  const auto result =
      lanczos(product_with(a), a.rows(),
              {.max_iterations = GetParam().products, .tolerance = 1e-6, .vectors = true});
  const auto& pair = result.dominant();
  const double scale = std::max(std::abs(dominant()), 1e-12);
  EXPECT_TRUE(result.converged);
  EXPECT_LE(result.iterations, GetParam().products);
  EXPECT_NEAR(pair.value, dominant(), 1e-6 * scale);
  EXPECT_LE(residual(a, pair), 1.01e-6 * scale + 1e-13);
  EXPECT_NEAR(residual(a, pair), pair.residual, 1e-10 * scale + 1e-13);
}

TEST_P(KnownSpectrum, LanczosBoundsTheErrorOfBothSignedEnds) {
  const Matrix<double> a = matrix_with<double>(GetParam().values);
  const auto result = lanczos(product_with(a), a.rows(),
                              {.max_iterations = static_cast<int>(a.rows()), .tolerance = 1e-14});
  const double scale = std::max(std::abs(dominant()), 1e-12);
  EXPECT_NEAR(result.largest.value, largest(), result.largest.residual + 1e-12 * scale);
  EXPECT_NEAR(result.smallest.value, smallest(), result.smallest.residual + 1e-12 * scale);
}

TEST_P(KnownSpectrum, LanczosInSinglePrecisionIsAsGoodAsItsProducts) {
  const Matrix<float> a = matrix_with<float>(GetParam().values);
  const auto result = lanczos(product_with(a), a.rows(),
                              {.max_iterations = GetParam().products, .tolerance = 1e-3});
  EXPECT_TRUE(result.converged);
  EXPECT_NEAR(result.dominant().value, dominant(), 1e-3 * std::max(std::abs(dominant()), 1e-6));
}

/// Distance from `value` to the nearest eigenvalue.
double distance_to(const std::vector<double>& spectrum, double value) {
  double nearest = std::numeric_limits<double>::infinity();
  for (const double eigenvalue : spectrum) {
    nearest = std::min(nearest, std::abs(eigenvalue - value));
  }
  return nearest;
}

TEST_P(KnownSpectrum, AnEigenvalueLiesWithinTheResidualAfterAnyNumberOfProducts) {
  const Matrix<double> a = matrix_with<double>(GetParam().values);
  const double rounding = 1e-12 * std::max(std::abs(dominant()), 1e-12);
  for (int products = 1; products <= 30; ++products) {
    const EigenOptions options{.max_iterations = products, .tolerance = 1e-12};
    const auto ends = lanczos(product_with(a), a.rows(), options);
    const auto power = power_iteration(product_with(a), a.rows(), options).dominant;
    EXPECT_LE(distance_to(GetParam().values, ends.largest.value), ends.largest.residual + rounding);
    EXPECT_LE(distance_to(GetParam().values, ends.smallest.value),
              ends.smallest.residual + rounding);
    EXPECT_LE(distance_to(GetParam().values, power.value), power.residual + rounding);
  }
}

TEST_P(KnownSpectrum, TheResidualHoldsInSinglePrecisionButForRounding) {
  const Matrix<float> a = matrix_with<float>(GetParam().values);
  const auto result = lanczos(product_with(a), a.rows(),
                              {.max_iterations = 30, .tolerance = 1e-3, .vectors = true});
  const double rounding = 1e-6 * std::max(std::abs(dominant()), 1e-12);
  EXPECT_LE(residual(a, result.largest), result.largest.residual + rounding);
  EXPECT_LE(residual(a, result.smallest), result.smallest.residual + rounding);
}

INSTANTIATE_TEST_SUITE_P(
    All, KnownSpectrum,
    ::testing::Values(
        Spectrum{"OneByOne", {-3.5}, 1}, Spectrum{"OneByOneZero", {0.0}, 1},
        Spectrum{"TwoByTwo", {2.0, -1.0}, 2}, Spectrum{"Prime", evenly(-1, 5, 13), 13},
        Spectrum{"Indefinite", evenly(-4, 7, 101), 60},
        Spectrum{"NegativeDominant", std::vector{-9.0} + evenly(-1, 5, 96), 40},
        Spectrum{"Clustered", evenly(5.0, 5.001, 20) + evenly(0, 1, 81), 101},
        Spectrum{"OppositeEqualEnds", std::vector{-5.0, 5.0} + evenly(-1, 1, 62), 30},
        Spectrum{"RankThree", std::vector{8.0, -3.0, 1.0} + evenly(0, 0, 125), 4},
        Spectrum{"Zero", evenly(0, 0, 31), 1}, Spectrum{"Identity", evenly(1, 1, 64), 1},
        Spectrum{"Repeated", evenly(7, 7, 10) + evenly(2, 2, 55), 2},
        Spectrum{"TinyScale", std::vector{3e-9} + evenly(-1e-9, 1e-9, 99), 40},
        Spectrum{"HessianLike", std::vector{120.0, 35.0, 11.0, -2.0} + evenly(-0.3, 0.5, 508), 20}),
    [](const auto& info) { return info.param.name; });

TEST(Lanczos, FindsALargerEigenvalueBesideOneThatItFindsFirst) {
  // Two ends far from the rest, of opposite signs: whichever shows first must not end the search.
  constexpr std::int64_t kSize = 1'000'000;
  for (const float other : {-20.0F, -12.0F, 12.0F}) {
    const Operator<float> diagonal = [&](std::span<const float> x, std::span<float> y) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        const float bulk = i % 2 == 0 ? 0.05F : -0.05F;
        y[i] = (i == 0 ? 10.0F : i == 1 ? other : bulk) * x[i];
      }
    };
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      const auto result = lanczos(diagonal, kSize, {.tolerance = 1e-2, .seed = seed});
      EXPECT_TRUE(result.converged);
      EXPECT_NEAR(result.dominant().value, other, 1e-2 * std::abs(other)) << seed;
    }
  }
}

TEST(Lanczos, GivesTheSameBitsOnAnyNumberOfThreads) {
  constexpr std::int64_t kSize = 100'003;  // several chunks, the last one short
  const Operator<float> diagonal = [](std::span<const float> x, std::span<float> y) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[i] = static_cast<float>(i % 1009) * x[i];
    }
  };
  const auto values = [&](int threads) {
    const kernels::ThreadScope scope(threads);
    return lanczos(diagonal, kSize, {.max_iterations = 15, .tolerance = 1e-9}).history;
  };
  EXPECT_EQ(values(1), values(3));
}

TEST(Lanczos, StopsEarlierWhenLessIsAsked) {
  const Matrix<double> a = matrix_with<double>(evenly(-4, 7, 101));
  const auto rough = lanczos(product_with(a), a.rows(), {.max_iterations = 101, .tolerance = 1e-2});
  const auto fine = lanczos(product_with(a), a.rows(), {.max_iterations = 101, .tolerance = 1e-8});
  EXPECT_LT(rough.iterations, fine.iterations);
  EXPECT_NEAR(rough.dominant().value, 7.0, 7e-2);
}

TEST(Lanczos, TellsTheDominantValueAfterEachProduct) {
  const Matrix<double> a = matrix_with<double>(std::vector{-9.0} + evenly(-1, 5, 96));
  const auto result = lanczos(product_with(a), a.rows(), {.max_iterations = 12, .tolerance = 1e-9});
  ASSERT_EQ(result.history.size(), 12U);
  for (int products = 1; products <= 12; ++products) {
    const auto shorter =
        lanczos(product_with(a), a.rows(), {.max_iterations = products, .tolerance = 1e-9});
    EXPECT_EQ(result.history[static_cast<std::size_t>(products) - 1], shorter.dominant().value);
  }
}

TEST(Lanczos, ReportsThatItDidNotConverge) {
  const Matrix<double> a = matrix_with<double>(evenly(-4, 7, 101));
  const auto result = lanczos(product_with(a), a.rows(), {.max_iterations = 3, .tolerance = 1e-8});
  EXPECT_FALSE(result.converged);
  EXPECT_EQ(result.iterations, 3);
  EXPECT_GT(result.dominant().residual, 1e-8 * 7.0);
}

TEST(Lanczos, MakesOrthonormalVectorsOfTheTwoEnds) {
  const Matrix<double> a = matrix_with<double>(evenly(-4, 7, 101));
  const auto result = lanczos(product_with(a), a.rows(),
                              {.max_iterations = 101, .tolerance = 1e-10, .vectors = true});
  const auto x = Eigen::Map<const Vector<double>>(result.largest.vector.data(), a.rows());
  const auto y = Eigen::Map<const Vector<double>>(result.smallest.vector.data(), a.rows());
  EXPECT_NEAR(x.norm(), 1.0, 1e-12);
  EXPECT_NEAR(y.norm(), 1.0, 1e-12);
  EXPECT_NEAR(x.dot(y), 0.0, 1e-12);
}

/// Bytes that the process has allocated.
std::size_t allocated() {
  const auto info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

TEST(Lanczos, HoldsItsBasisAndOneVectorMore) {
  constexpr std::int64_t kSize = 1 << 18;
  constexpr std::size_t kVector = kSize * sizeof(float);
  std::vector<std::size_t> bytes;
  const Operator<float> diagonal = [&](std::span<const float> x, std::span<float> y) {
    bytes.push_back(allocated());
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[i] = static_cast<float>(i % 1009) * x[i];
    }
  };
  const std::size_t before = allocated();
  const std::vector<char> seen(kVector);
  if (allocated() < before + kVector) {
    GTEST_SKIP() << "a sanitizer's allocator does not tell what it holds";
  }
  const std::size_t start = allocated();
  lanczos(diagonal, kSize, {.max_iterations = 20, .tolerance = 1e-9});
  ASSERT_EQ(bytes.size(), 20U);
  for (std::size_t products = 1; products <= bytes.size(); ++products) {
    EXPECT_LE(bytes[products - 1] - start, (products + 1) * kVector + (64U << 10));
  }
  EXPECT_LE(allocated(), start + (64U << 10));
}

TEST(Lanczos, GivesTheSameBitsForTheSameSeed) {
  const Matrix<float> a = matrix_with<float>(evenly(-4, 7, 101));
  const EigenOptions options{.max_iterations = 12, .seed = 5};
  EXPECT_EQ(lanczos(product_with(a), a.rows(), options).largest.value,
            lanczos(product_with(a), a.rows(), options).largest.value);
}

TEST(Lanczos, EndsWhenThereWasEnoughButNotBeforeTheSecondProduct) {
  const Matrix<double> a = matrix_with<double>(evenly(-4, 7, 101));
  const auto result =
      lanczos(product_with(a), a.rows(), {.tolerance = 1e-12, .enough = [] { return true; }});
  EXPECT_EQ(result.iterations, 2);
  EXPECT_FALSE(result.converged);
}

TEST(PowerIteration, FindsTheDominantEigenvalueWithItsSign) {
  const Matrix<double> a = matrix_with<double>(std::vector{-9.0} + evenly(-1, 5, 96));
  const auto result = power_iteration(product_with(a), a.rows(),
                                      {.max_iterations = 200, .tolerance = 1e-6, .vectors = true});
  EXPECT_TRUE(result.converged);
  EXPECT_NEAR(result.dominant.value, -9.0, 9e-6);
  EXPECT_LE(residual(a, result.dominant), 1.01e-6 * 9.0);
}

TEST(PowerIteration, NeedsMoreProductsThanLanczos) {
  const Matrix<double> a = matrix_with<double>(std::vector{6.0} + evenly(-1, 5, 96));
  const EigenOptions options{.max_iterations = 500, .tolerance = 1e-3};
  EXPECT_GT(power_iteration(product_with(a), a.rows(), options).iterations,
            2 * lanczos(product_with(a), a.rows(), options).iterations);
}

TEST(PowerIteration, DoesNotConvergeOnOppositeEqualEnds) {
  const Matrix<double> a = matrix_with<double>(std::vector{-5.0, 5.0} + evenly(-1, 1, 62));
  const auto result = power_iteration(product_with(a), a.rows(), {.max_iterations = 300});
  EXPECT_FALSE(result.converged);
  EXPECT_EQ(result.iterations, 300);
}

TEST(PowerIteration, OfTheZeroMatrixIsZero) {
  const Matrix<double> a = Matrix<double>::Zero(7, 7);
  const auto result = power_iteration(product_with(a), 7);
  EXPECT_TRUE(result.converged);
  EXPECT_EQ(result.dominant.value, 0.0);
}

TEST(EigenSolvers, RefuseOptionsOutOfRange) {
  const Matrix<double> a = Matrix<double>::Identity(2, 2);
  EXPECT_THROW(lanczos(product_with(a), 0), Error);
  EXPECT_THROW(lanczos(product_with(a), 2, {.max_iterations = 0}), Error);
  EXPECT_THROW(power_iteration(product_with(a), 2, {.tolerance = 0.0}), Error);
}

TEST(EigenSolvers, RefuseProductsThatAreNotFinite) {
  const Operator<double> broken = [](std::span<const double>, std::span<double> y) {
    std::fill(y.begin(), y.end(), std::numeric_limits<double>::quiet_NaN());
  };
  EXPECT_THROW(lanczos(broken, 5), Error);
  EXPECT_THROW(power_iteration(broken, 5), Error);
}

}  // namespace
}  // namespace moq::hessian
