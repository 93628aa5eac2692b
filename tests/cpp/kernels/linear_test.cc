#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/common/parallel.h"
#include "kernels/quant_grid.h"
#include "tests/cpp/kernels/linear_problem.h"

namespace moq::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr InputMode kModes[] = {InputMode::kFloat32, InputMode::kDynamicInt8,
                                InputMode::kStaticInt8, InputMode::kDynamicAsymmetricInt8,
                                InputMode::kStaticAsymmetricInt8};

/// The integers that stand for a row of the input and the value of one, as kernels/linear.h says.
double split(const float* row, std::int64_t k, InputMode mode, std::vector<std::int64_t>& x) {
  float lowest = 0.0F;
  float highest = 0.0F;
  for (std::int64_t i = 0; i < k; ++i) {
    lowest = std::min(lowest, row[i]);
    highest = std::max(highest, row[i]);
  }
  const GridParams grid = is_static(mode)
                              ? static_grid(LinearProblem::rounding(mode))
                              : make_grid(lowest, highest, 8, grid_mode(mode), DType::kFloat32);
  const float absmax = std::max(-lowest, highest);
  const int exponent = absmax > 0.0F ? 29 - std::ilogb(absmax) : 0;
  x.clear();
  for (std::int64_t i = 0; i < k; ++i) {
    x.push_back(mode == InputMode::kFloat32
                    ? std::llrint(std::ldexp(static_cast<double>(row[i]), exponent))
                    : quantize_one(row[i], grid, Rounding::kNearest, 0.0F) - grid.zero_point);
  }
  return mode == InputMode::kFloat32 ? std::ldexp(1.0, -exponent) : grid.scale;
}

/// The definition: integer sums of at most 8192 columns, put together in float64.
std::vector<float> by_definition(const LinearProblem& problem, InputMode mode) {
  const LinearShape& shape = problem.shape;
  std::vector<float> output;
  std::vector<std::int64_t> x;
  for (std::int64_t i = 0; i < problem.m; ++i) {
    const double unit = split(problem.input.data() + i * shape.k, shape.k, mode, x);
    for (std::int64_t j = 0; j < shape.n; ++j) {
      double total = 0.0;
      for (std::int64_t group = 0; group < num_groups(shape); ++group) {
        const std::int64_t g = j * num_groups(shape) + group;
        const std::int64_t zero_point = shape.asymmetric ? problem.zero_points[g] : 0;
        for (std::int64_t piece = 0; piece < shape.group_size; piece += 8192) {
          std::int64_t sum = 0;
          for (std::int64_t c = piece; c < std::min(piece + 8192, shape.group_size); ++c) {
            const std::int64_t col = group * shape.group_size + c;
            sum += x[col] * (problem.codes[j * shape.k + col] - zero_point);
          }
          total += static_cast<double>(sum) * problem.scales[g];
        }
      }
      output.push_back(static_cast<float>(total * unit + problem.bias[j]));
    }
  }
  return output;
}

/// Largest errors against float64 of `output` and of the plain float32 loop.
struct Errors {
  double ours = 0.0;
  double naive = 0.0;
};

Errors errors_of(const LinearProblem& problem, const std::vector<float>& output) {
  const auto [n, k] = std::pair(problem.shape.n, problem.shape.k);
  Errors errors;
  for (std::int64_t i = 0; i < problem.m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double exact = 0.0;
      float naive = 0.0F;
      for (std::int64_t c = 0; c < k; ++c) {
        const double weight = problem.weight_at(j, c);
        exact += problem.input[i * k + c] * weight;
        naive += problem.input[i * k + c] * static_cast<float>(weight);
      }
      exact += problem.bias[j];
      naive += problem.bias[j];
      errors.ours = std::max(errors.ours, std::fabs(output[i * n + j] - exact));
      errors.naive = std::max(errors.naive, std::fabs(naive - exact));
    }
  }
  return errors;
}

// --------------------------------------------------------------------------------- every shape

struct Case {
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  std::int64_t group_size;
  WeightFormat format;
  bool asymmetric;
};

std::string name_of_case(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return std::string(name_of(c.format)) + (c.asymmetric ? "_asymmetric_m" : "_m") +
         std::to_string(c.m) + "_n" + std::to_string(c.n) + "_k" + std::to_string(c.k) + "_g" +
         std::to_string(c.group_size) + "_" + std::to_string(info.index);
}

std::vector<Case> integer_cases() {
  std::vector<Case> cases;
  for (const WeightFormat format :
       {WeightFormat::kInt8, WeightFormat::kInt4, WeightFormat::kInt2}) {
    for (const bool asymmetric : {false, true}) {
      cases.push_back({1, 1, 1, 1, format, asymmetric});
      cases.push_back({1, 31, 17, 17, format, asymmetric});
      cases.push_back({2, 33, 64, 16, format, asymmetric});
      cases.push_back({5, 97, 105, 35, format, asymmetric});
      cases.push_back({13, 64, 101, 101, format, asymmetric});
      cases.push_back({29, 5, 6, 1, format, asymmetric});
      cases.push_back({3, 96, 576, 576, format, asymmetric});
    }
  }
  return cases;
}

class IntegerLinear : public testing::TestWithParam<Case> {
 protected:
  LinearProblem problem_ =
      LinearProblem::random(GetParam().m, GetParam().n, GetParam().k, GetParam().format,
                            GetParam().group_size, GetParam().asymmetric);
};

TEST_P(IntegerLinear, GivesTheBitsOfTheDefinition) {
  for (const InputMode mode : kModes) {
    EXPECT_EQ(problem_.run(mode), by_definition(problem_, mode)) << name_of(mode);
  }
}

TEST_P(IntegerLinear, IsAsExactAsAPlainFloat32Loop) {
  const Errors errors = errors_of(problem_, problem_.run());
  EXPECT_LE(errors.ours, 2.0 * errors.naive + 1e-7);
}

INSTANTIATE_TEST_SUITE_P(Shapes, IntegerLinear, testing::ValuesIn(integer_cases()), name_of_case);

std::vector<Case> float_cases() {
  std::vector<Case> cases;
  for (const WeightFormat format :
       {WeightFormat::kFloat32, WeightFormat::kBFloat16, WeightFormat::kFloat16}) {
    cases.push_back({1, 1, 1, 0, format, false});
    cases.push_back({1, 31, 17, 0, format, false});
    cases.push_back({5, 97, 523, 0, format, false});
    cases.push_back({29, 64, 768, 0, format, false});
  }
  return cases;
}

class FloatLinear : public testing::TestWithParam<Case> {};

TEST_P(FloatLinear, IsAsExactAsAPlainFloat32Loop) {
  const auto problem =
      LinearProblem::random(GetParam().m, GetParam().n, GetParam().k, GetParam().format);
  const Errors errors = errors_of(problem, problem.run());
  EXPECT_LE(errors.ours, 2.0 * errors.naive + 1e-7);
}

INSTANTIATE_TEST_SUITE_P(Shapes, FloatLinear, testing::ValuesIn(float_cases()), name_of_case);

// -------------------------------------------------------------------- what a result depends on

class EveryFormat : public testing::TestWithParam<WeightFormat> {};

TEST_P(EveryFormat, GivesARowOfABatchTheBitsOfTheRowAlone) {
  const LinearProblem batch = LinearProblem::random(67, 70, 300, GetParam());
  const std::vector<float> together = batch.run();
  for (std::int64_t i = 0; i < batch.m; ++i) {
    LinearProblem row = batch;
    row.m = 1;
    row.input.assign(batch.input.begin() + i * 300, batch.input.begin() + (i + 1) * 300);
    const std::vector<float> expected(together.begin() + i * 70, together.begin() + (i + 1) * 70);
    EXPECT_EQ(row.run(), expected) << "row " << i;
  }
}

TEST_P(EveryFormat, GivesTheSameBitsOnAnyNumberOfThreads) {
  const LinearProblem problem = LinearProblem::random(40, 1000, 768, GetParam());
  const std::vector<float> expected = problem.run();
  for (const int threads : {2, 3, 7}) {
    const ThreadScope scope(threads);
    EXPECT_EQ(problem.run(), expected) << threads << " threads";
  }
}

TEST_P(EveryFormat, GivesTheSameBitsWhenThreadsShareTheRowsOfFewOutputs) {
  const LinearProblem problem = LinearProblem::random(67, 40, 768, GetParam());
  const std::vector<float> expected = problem.run();
  const ThreadScope scope(5);
  EXPECT_EQ(problem.run(), expected);
}

TEST_P(EveryFormat, PacksATransposedWeightAlike) {
  const LinearProblem problem = LinearProblem::random(2, 37, 53, GetParam());
  const std::vector<std::byte> weight = problem.weight_data();
  const std::size_t size = weight.size() / (37 * 53);
  std::vector<std::byte> transposed(weight.size());
  for (std::int64_t i = 0; i < 37; ++i) {
    for (std::int64_t j = 0; j < 53; ++j) {
      std::copy_n(weight.begin() + (i * 53 + j) * size, size,
                  transposed.begin() + (j * 37 + i) * size);
    }
  }
  LinearProblem other = problem;
  other.packed = std::make_shared<AlignedBytes>(cpu::packed_linear_size(problem.shape));
  PackLinearArgs args = other.pack_args(transposed.data());
  args.row_stride = 1;
  args.col_stride = 37;
  cpu::pack_linear(args);
  EXPECT_EQ(other.run(), problem.run());
}

TEST_P(EveryFormat, LeavesTheActivationOfTheBiasWithoutColumns) {
  LinearProblem problem = LinearProblem::random(3, 5, 0, GetParam());
  const std::vector<float> output = problem.run();
  for (std::int64_t i = 0; i < 15; ++i) {
    EXPECT_EQ(output[i], problem.bias[i % 5]);
  }
}

TEST_P(EveryFormat, DoesNothingForNoRowsOrNoOutputs) {
  EXPECT_TRUE(LinearProblem::random(0, 5, 7, GetParam()).run().empty());
  EXPECT_TRUE(LinearProblem::random(3, 0, 7, GetParam()).run().empty());
}

INSTANTIATE_TEST_SUITE_P(Formats, EveryFormat,
                         testing::Values(WeightFormat::kInt8, WeightFormat::kInt4,
                                         WeightFormat::kInt2, WeightFormat::kFloat32,
                                         WeightFormat::kBFloat16, WeightFormat::kFloat16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

// --------------------------------------------------------------------------- numbers at the edge

TEST(Linear, KeepsEverySumExactForManyColumnsOfTheLargestNumbers) {
  // 70,000 products of the largest element and the largest digit, where a 32-bit sum would
  // overflow.
  LinearProblem problem = LinearProblem::random(2, 33, 70000);
  std::fill(problem.codes.begin(), problem.codes.end(), std::int8_t{127});
  std::fill(problem.input.begin(), problem.input.end(), 0x1.fffffep0F);
  problem.pack();
  for (const InputMode mode : kModes) {
    EXPECT_EQ(problem.run(mode), by_definition(problem, mode)) << name_of(mode);
  }
}

TEST(Linear, KeepsEverySumExactForTheSmallestCodes) {
  LinearProblem problem = LinearProblem::random(1, 33, 9000);
  std::fill(problem.codes.begin(), problem.codes.end(), std::int8_t{-128});
  std::fill(problem.input.begin(), problem.input.end(), -0x1.fffffep0F);
  problem.pack();
  for (const InputMode mode : kModes) {
    EXPECT_EQ(problem.run(mode), by_definition(problem, mode)) << name_of(mode);
  }
}

/// Integers whose digits in base 2^11 or 2^8 are as large as digits get, in a row whose absmax
/// gives the integers the unit 2^-29.
class LargestDigits : public testing::TestWithParam<int> {};

TEST_P(LargestDigits, KeepEverySumExact) {
  LinearProblem problem = LinearProblem::random(1, 33, 16384);
  std::fill(problem.codes.begin(), problem.codes.end(), std::int8_t{127});
  std::fill(problem.input.begin(), problem.input.end(), std::ldexp(GetParam(), -29));
  problem.input.back() = 1.0F;
  problem.pack();
  EXPECT_EQ(problem.run(), by_definition(problem, InputMode::kFloat32));
}

INSTANTIATE_TEST_SUITE_P(Signs, LargestDigits,
                         testing::Values(1023 * 2049, -1024 * 2049, 127 * 65793, -128 * 65793));

class InputMagnitude : public testing::TestWithParam<float> {};

TEST_P(InputMagnitude, DoesNotChangeTheRelativeError) {
  LinearProblem problem = LinearProblem::random(2, 40, 200);
  std::fill(problem.bias.begin(), problem.bias.end(), 0.0F);
  for (float& x : problem.input) {
    x *= GetParam();
  }
  EXPECT_EQ(problem.run(), by_definition(problem, InputMode::kFloat32));
}

INSTANTIATE_TEST_SUITE_P(PowersOfTwo, InputMagnitude,
                         testing::Values(0x1p-149F, 0x1p-130F, 0x1p-100F, 1.0F, 0x1p60F, 0x1p110F));

TEST(Linear, RepresentsSmallElementsBesideAnOutlier) {
  LinearProblem problem = LinearProblem::random(1, 64, 512);
  problem.input[100] = 1000.0F;
  const Errors errors = errors_of(problem, problem.run());
  EXPECT_LE(errors.ours, 2.0 * errors.naive);
}

TEST(Linear, GivesZeroPlusBiasForAZeroRow) {
  LinearProblem problem = LinearProblem::random(1, 40, 50);
  std::fill(problem.input.begin(), problem.input.end(), 0.0F);
  for (const InputMode mode : kModes) {
    EXPECT_EQ(problem.run(mode), problem.bias) << name_of(mode);
  }
}

/// Row 7 of 15 rows of 40 outputs is NaN, the others are the expected ones.
void expect_only_row_7_spoilt(const std::vector<float>& output,
                              const std::vector<float>& expected) {
  for (std::int64_t i = 0; i < 15 * 40; ++i) {
    if (i / 40 == 7) {
      EXPECT_TRUE(std::isnan(output[i])) << i << ": " << output[i];
    } else {
      EXPECT_EQ(output[i], expected[i]) << i;
    }
  }
}

class NonFinite : public testing::TestWithParam<std::tuple<float, InputMode>> {};

TEST_P(NonFinite, SpoilsItsOwnRowAndNoOther) {
  const auto [value, mode] = GetParam();
  LinearProblem problem = LinearProblem::random(15, 40, 50);
  const std::vector<float> expected = problem.run(mode);
  problem.input[7 * 50 + 3] = value;
  expect_only_row_7_spoilt(problem.run(mode), expected);
}

INSTANTIATE_TEST_SUITE_P(OwnGrid, NonFinite,
                         testing::Combine(testing::Values(kNan, -kNan, kInfinity, -kInfinity),
                                          testing::Values(InputMode::kFloat32,
                                                          InputMode::kDynamicInt8,
                                                          InputMode::kDynamicAsymmetricInt8)));
INSTANTIATE_TEST_SUITE_P(GivenGrid, NonFinite,
                         testing::Combine(testing::Values(kNan, -kNan),
                                          testing::Values(InputMode::kStaticInt8,
                                                          InputMode::kStaticAsymmetricInt8)));

TEST(Linear, SaturatesAnInfinityOnAStaticGrid) {
  LinearProblem problem = LinearProblem::random(1, 40, 50);
  for (const InputMode mode : {InputMode::kStaticInt8, InputMode::kStaticAsymmetricInt8}) {
    problem.input[3] = -100.0F;
    const std::vector<float> expected = problem.run(mode);
    problem.input[3] = -kInfinity;
    EXPECT_EQ(problem.run(mode), expected) << name_of(mode);
  }
}

TEST(Linear, RoundsAPartOfARowToTheGridOfTheWholeRow) {
  const LinearProblem problem = LinearProblem::random(3, 40, 50);
  std::vector<float> output(3 * 40);
  LinearArgs args = problem.args(output.data(), InputMode::kDynamicInt8);
  const std::vector<float> absmax(3, 127.0F * 0.02F);
  args.input_extents = absmax.data();
  cpu::linear(args);
  EXPECT_EQ(output, problem.run(InputMode::kStaticInt8));  // whose step size is 0.02

  args.input_rounding.mode = InputMode::kDynamicAsymmetricInt8;
  std::vector<float> extents(3, (128.0F - 37.0F) * 0.02F);  // below 0
  extents.resize(6, (127.0F + 37.0F) * 0.02F);              // above 0
  args.input_extents = extents.data();
  cpu::linear(args);
  EXPECT_EQ(output, problem.run(InputMode::kStaticAsymmetricInt8));  // whose zero point is -37
}

class PartOfARow : public testing::TestWithParam<std::tuple<InputMode, float>> {
 protected:
  /// The product where rows are parts of longer ones of the given extents.
  std::vector<float> run() const {
    std::vector<float> output(15 * 40);
    LinearArgs args = problem_.args(output.data(), std::get<InputMode>(GetParam()));
    args.input_extents = extents_.data();
    cpu::linear(args);
    return output;
  }

  float value_ = std::get<float>(GetParam());
  LinearProblem problem_ = LinearProblem::random(15, 40, 50);
  std::vector<float> extents_ = std::vector<float>(30, 2.5F);
};

TEST_P(PartOfARow, IsNaNWhereTheWholeRowHasNoGrid) {
  const std::vector<float> expected = run();
  extents_[7] = value_;
  expect_only_row_7_spoilt(run(), expected);
}

TEST_P(PartOfARow, IsNaNWhereItHoldsANonFiniteNumberItself) {
  const std::vector<float> expected = run();
  problem_.input[7 * 50 + 3] = value_;
  expect_only_row_7_spoilt(run(), expected);
}

INSTANTIATE_TEST_SUITE_P(Values, PartOfARow,
                         testing::Combine(testing::Values(InputMode::kDynamicInt8,
                                                          InputMode::kDynamicAsymmetricInt8),
                                          testing::Values(kNan, -kNan, kInfinity, -kInfinity)));

}  // namespace
}  // namespace moq::kernels
