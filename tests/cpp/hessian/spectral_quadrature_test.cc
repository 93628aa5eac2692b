#include "csrc/hessian/solvers/spectral_quadrature.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/common/check.h"
#include "tests/cpp/hessian/known_spectrum.h"

namespace moq::hessian {
namespace {

struct Spectrum {
  const char* name;
  std::vector<double> values;
};

double identity(double x) {
  return x;
}
double square(double x) {
  return x * x;
}

double fourth(double x) {
  return x * x * x * x;
}

class Quadrature : public ::testing::TestWithParam<Spectrum> {
 protected:
  const std::vector<double>& values() const { return GetParam().values; }
  double sum(double (*f)(double)) const {
    return std::accumulate(values().begin(), values().end(), 0.0,
                           [f](double total, double x) { return total + f(x); });
  }
  /// |A|, and so the scale of rounding errors.
  double magnitude() const {
    return std::max(
        std::abs(values().front()),
        std::abs(*std::max_element(values().begin(), values().end(),
                                   [](auto a, auto b) { return std::abs(a) < std::abs(b); })));
  }
  double rounding(double epsilon) const {
    return epsilon * static_cast<double>(values().size()) * std::max(magnitude(), 1e-12);
  }
};

TEST_P(Quadrature, TraceAndTraceOfTheSquareLieWithinFourStandardErrors) {
  const Matrix<double> a = matrix_with<double>(values());
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = 20, .probes = 12});
  const Estimate trace = trace_of(found, identity);
  const Estimate squares = trace_of(found, square);
  EXPECT_NEAR(trace.value, sum(identity), 4.0 * trace.standard_error + rounding(1e-12));
  EXPECT_NEAR(squares.value, sum(square),
              4.0 * squares.standard_error + rounding(1e-12) * magnitude());
  // The variance of z' B z is at most 2 |B|_F^2; 12 draws tell it within a factor of 4.
  EXPECT_LE(trace.standard_error, 2.0 * std::sqrt(2.0 / 12.0 * sum(square)) + rounding(1e-12));
  EXPECT_LE(squares.standard_error,
            2.0 * std::sqrt(2.0 / 12.0 * sum(fourth)) + rounding(1e-12) * magnitude());
}

TEST_P(Quadrature, RulesAreMeasuresWithinTheSpectrum) {
  const Matrix<double> a = matrix_with<double>(values());
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = 20, .probes = 3});
  const auto [low, high] = std::minmax_element(values().begin(), values().end());
  for (const QuadratureRule& rule : found.probes) {
    ASSERT_EQ(rule.nodes.size(), rule.weights.size());
    EXPECT_LE(rule.nodes.size(), 20U);
    EXPECT_TRUE(std::is_sorted(rule.nodes.begin(), rule.nodes.end()));
    EXPECT_GE(rule.nodes.front(), *low - rounding(1e-12));
    EXPECT_LE(rule.nodes.back(), *high + rounding(1e-12));
    EXPECT_GE(*std::min_element(rule.weights.begin(), rule.weights.end()), 0.0);
    EXPECT_NEAR(std::accumulate(rule.weights.begin(), rule.weights.end(), 0.0), 1.0, 1e-12);
  }
}

TEST_P(Quadrature, IsTheSpectrumItselfWithAsManyStepsAsRows) {
  const Matrix<double> a = matrix_with<double>(values());
  const int steps = static_cast<int>(a.rows()) + 3;
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = steps});
  std::vector<double> sorted = values();
  std::sort(sorted.begin(), sorted.end());
  EXPECT_TRUE(found.exact);
  EXPECT_EQ(found.products, a.rows());
  ASSERT_EQ(found.probes.size(), 1U);
  ASSERT_EQ(found.probes.front().nodes.size(), sorted.size());
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    EXPECT_NEAR(found.probes.front().nodes[i], sorted[i], rounding(1e-13));
  }
  const Estimate trace = trace_of(found, identity);
  EXPECT_NEAR(trace.value, sum(identity), rounding(1e-12));
  EXPECT_EQ(trace.standard_error, 0.0);
  EXPECT_NEAR(trace_of(found, square).value, sum(square), rounding(1e-12) * magnitude());
}

TEST_P(Quadrature, SinglePrecisionAgreesWithDouble) {
  const Matrix<double> a = matrix_with<double>(values());
  const Matrix<float> rounded = a.cast<float>();
  const QuadratureOptions options{.steps = 20, .probes = 4};
  const auto expected = trace_of(spectral_quadrature(product_with(a), a.rows(), options), square);
  const auto found =
      trace_of(spectral_quadrature(product_with(rounded), a.rows(), options), square);
  EXPECT_NEAR(found.value, expected.value, rounding(1e-6) * magnitude());
}

TEST_P(Quadrature, TheDensityHasIntegralOne) {
  const Matrix<double> a = matrix_with<double>(values());
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = 20, .probes = 3});
  const double width = 0.05 * std::max(magnitude(), 1e-12);
  const std::vector<double> grid = evenly(-magnitude() - 8 * width, magnitude() + 8 * width, 2001);
  double integral = 0.0;
  for (const Estimate& density : smooth_density(found, grid, width)) {
    EXPECT_GE(density.value, 0.0);
    integral += density.value * (grid[1] - grid[0]);
  }
  EXPECT_NEAR(integral, 1.0, 1e-9);
}

INSTANTIATE_TEST_SUITE_P(
    All, Quadrature,
    ::testing::Values(Spectrum{"OneByOne", {-3.5}}, Spectrum{"OneByOneZero", {0.0}},
                      Spectrum{"TwoByTwo", {2.0, -1.0}}, Spectrum{"Prime", evenly(-1, 5, 13)},
                      Spectrum{"Indefinite", evenly(-4, 7, 101)},
                      Spectrum{"NegativeDominant", std::vector{-9.0} + evenly(-1, 5, 96)},
                      Spectrum{"Clustered", evenly(5.0, 5.001, 20) + evenly(0, 1, 81)},
                      Spectrum{"RankThree", std::vector{8.0, -3.0, 1.0} + evenly(0, 0, 125)},
                      Spectrum{"Zero", evenly(0, 0, 31)}, Spectrum{"Identity", evenly(1, 1, 64)},
                      Spectrum{"TinyScale", std::vector{3e-9} + evenly(-1e-9, 1e-9, 99)},
                      Spectrum{"HessianLike",
                               std::vector{120.0, 35.0, 11.0, -2.0} + evenly(-0.3, 0.5, 508)}),
    [](const auto& info) { return info.param.name; });

/// Share of the eigenvalues in [low, high], with its standard error.
Estimate share(const SpectralQuadrature& found, double low, double high) {
  const Estimate count =
      trace_of(found, [=](double x) { return low <= x && x <= high ? 1.0 : 0.0; });
  const auto n = static_cast<double>(found.n);
  return {count.value / n, count.standard_error / n};
}

TEST(SpectralQuadrature, CountsTheEigenvaluesOfAClusterAndOfANullSpace) {
  const Matrix<double> a =
      matrix_with<double>(evenly(5.0, 5.001, 50) + evenly(-1, 1, 50) + evenly(-7, -7, 100));
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = 30, .probes = 16});
  const Estimate cluster = share(found, 4.9, 5.1);
  const Estimate repeated = share(found, -7.1, -6.9);
  EXPECT_NEAR(cluster.value, 0.25, 4.0 * cluster.standard_error);
  EXPECT_LE(cluster.standard_error, 0.02);
  EXPECT_NEAR(repeated.value, 0.5, 4.0 * repeated.standard_error);
  EXPECT_LE(repeated.standard_error, 0.02);
}

TEST(SpectralQuadrature, FollowsASmoothDensityWithinItsError) {
  const Matrix<double> a = matrix_with<double>(evenly(-1, 1, 400));
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = 40, .probes = 16});
  const std::vector<double> inside = evenly(-0.6, 0.6, 7);
  for (const Estimate& density : smooth_density(found, inside, 0.1)) {
    EXPECT_NEAR(density.value, 0.5, 4.0 * density.standard_error + 0.005);
    EXPECT_LE(density.standard_error, 0.05);
  }
}

TEST(SpectralQuadrature, EndsAProbeWhereTheKrylovSpaceDoes) {
  const Matrix<double> a = matrix_with<double>(evenly(2, 2, 40) + evenly(-1, -1, 40));
  const auto found = spectral_quadrature(product_with(a), a.rows(), {.steps = 30, .probes = 3});
  EXPECT_EQ(found.products, 6);
  for (const QuadratureRule& rule : found.probes) {
    ASSERT_EQ(rule.nodes.size(), 2U);
    EXPECT_NEAR(rule.nodes[0], -1.0, 1e-12);
    EXPECT_NEAR(rule.nodes[1], 2.0, 1e-12);
  }
}

TEST(SpectralQuadrature, IsHutchinsonsEstimateWithOneStep) {
  const Matrix<double> a = matrix_with<double>(evenly(-4, 7, 101));
  const auto found =
      spectral_quadrature(product_with(a), a.rows(), {.steps = 1, .probes = 5, .seed = 3});
  const auto longer =
      spectral_quadrature(product_with(a), a.rows(), {.steps = 25, .probes = 5, .seed = 3});
  EXPECT_NEAR(trace_of(found, identity).value, trace_of(longer, identity).value, 1e-9);
  EXPECT_EQ(found.products, 5);
}

TEST(SpectralQuadrature, TheErrorFallsWithTheProbesAndTheSeedDecides) {
  const Matrix<double> a = matrix_with<double>(evenly(-4, 7, 101));
  const auto estimate = [&](int probes, std::uint64_t seed) {
    const QuadratureOptions options{.steps = 10, .probes = probes, .seed = seed};
    return trace_of(spectral_quadrature(product_with(a), a.rows(), options), identity);
  };
  EXPECT_LT(estimate(64, 1).standard_error, estimate(4, 1).standard_error);
  EXPECT_EQ(estimate(4, 1).value, estimate(4, 1).value);
  EXPECT_NE(estimate(4, 1).value, estimate(4, 2).value);
}

TEST(SpectralQuadrature, RefusesOptionsOutOfRange) {
  const Matrix<double> a = Matrix<double>::Identity(2, 2);
  EXPECT_THROW(spectral_quadrature(product_with(a), 0), Error);
  EXPECT_THROW(spectral_quadrature(product_with(a), 2, {.steps = 0}), Error);
  EXPECT_THROW(spectral_quadrature(product_with(a), 2, {.probes = 1}), Error);
  const auto found = spectral_quadrature(product_with(a), 2);
  EXPECT_THROW(smooth_density(found, evenly(0, 1, 3), 0.0), Error);
  EXPECT_THROW(smooth_density(found, evenly(0, 1, 3), std::numeric_limits<double>::quiet_NaN()),
               Error);
}

class Rows : public ::testing::TestWithParam<std::int64_t> {};

TEST_P(Rows, ProductsThatAreNotFiniteAreRefused) {
  const Operator<double> broken = [](std::span<const double>, std::span<double> y) {
    std::fill(y.begin(), y.end(), 1.0);
    y.back() = std::numeric_limits<double>::quiet_NaN();
  };
  EXPECT_THROW(spectral_quadrature(broken, GetParam()), Error);
}

INSTANTIATE_TEST_SUITE_P(FewAndMany, Rows, ::testing::Values(1, 5, 100));

}  // namespace
}  // namespace moq::hessian
