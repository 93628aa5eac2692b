#include "kernels/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/name_hash.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/quantize.h"
#include "tests/cpp/kernels/fake_quantize_axes.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"

namespace moq::kernels::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// What quantize_activation writes.
struct Quantized {
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::vector<std::byte> output;
};

/// Scales as bit patterns, so that NaN equals NaN.
bool operator==(const Quantized& a, const Quantized& b) {
  const auto bits = [](float scale) { return std::bit_cast<std::uint32_t>(scale); };
  return a.codes == b.codes && a.output == b.output &&
         std::ranges::equal(a.scales, b.scales, {}, bits, bits);
}

using Quantize = std::function<void(const QuantizeActivationArgs&)>;

/// Runs `quantize` over the rows of a problem in linear storage.
Quantized run(const Problem& problem, const float* static_scale = nullptr,
              const Quantize& quantize = cpu::quantize_activation) {
  const Case& c = problem.parameters;
  const auto size = static_cast<std::size_t>(c.rows * c.cols);
  Quantized result{std::vector<std::int8_t>(size, 99),
                   std::vector<float>(static_cast<std::size_t>(c.rows), -1.0F),
                   std::vector<std::byte>(size * size_of(c.input_dtype))};
  quantize({.input = problem.input.data(),
            .codes = result.codes.data(),
            .scales = result.scales.data(),
            .output = result.output.data(),
            .static_scale = static_scale,
            .rows = c.rows,
            .cols = c.cols,
            .row_stride = problem.row_stride,
            .input_dtype = c.input_dtype});
  return result;
}

/// The formulas of kernels/quantize.h, one element at a time.
Quantized quantized(const Problem& problem, const float* static_scale = nullptr) {
  const Case& c = problem.parameters;
  const auto size = static_cast<std::size_t>(c.rows * c.cols);
  Quantized result{std::vector<std::int8_t>(size),
                   std::vector<float>(static_cast<std::size_t>(c.rows), -1.0F),
                   std::vector<std::byte>(size * size_of(c.input_dtype))};
  for (std::int64_t row = 0; row < c.rows; ++row) {
    float absmax = 0.0F;
    bool finite = true;
    for (std::int64_t col = 0; col < c.cols; ++col) {
      absmax = std::fmax(absmax, std::fabs(problem.get(row, col)));
      finite = finite && std::isfinite(problem.get(row, col));
    }
    const GridParams grid =
        static_scale != nullptr
            ? grid_of_scale(*static_scale, 8)
            : make_grid(-absmax, absmax, 8, QuantMode::kSymmetric, DType::kFloat32);
    const bool row_is_bad = !finite && static_scale == nullptr;
    if (static_scale == nullptr) {
      result.scales[static_cast<std::size_t>(row)] = row_is_bad ? kNaN : grid.scale;
    }
    for (std::int64_t col = 0; col < c.cols; ++col) {
      const float value = problem.get(row, col);
      const bool bad = row_is_bad || std::isnan(value);
      const std::int32_t code = bad ? 0 : quantize_one(value, grid, Rounding::kNearest, 0.0F);
      const auto place = static_cast<std::size_t>(row * c.cols + col);
      result.codes[place] = static_cast<std::int8_t>(code);
      put_float(result.output, c.input_dtype, place, bad ? kNaN : dequantize_one(code, grid));
    }
  }
  return result;
}

class QuantizeActivation
    : public ::testing::TestWithParam<std::tuple<std::int64_t, std::int64_t, DType>> {
 protected:
  Problem problem() const {
    const auto& [rows, cols, dtype] = GetParam();
    return Problem({.rows = rows, .cols = cols, .input_dtype = dtype});
  }
};

TEST_P(QuantizeActivation, GivesTheBitsOfTheDefinition) {
  EXPECT_EQ(run(problem()), quantized(problem()));
}

TEST_P(QuantizeActivation, GivesTheSameBitsWithEveryInstructionSet) {
  const Problem problem = this->problem();
  EXPECT_EQ(run(problem, nullptr, cpu::scalar::quantize_activation), quantized(problem));
  if (cpu::active_isa() >= cpu::Isa::kAvx2) {
    EXPECT_EQ(run(problem, nullptr, cpu::avx2::quantize_activation), quantized(problem));
  }
  if (cpu::active_isa() >= cpu::Isa::kAvx512) {
    EXPECT_EQ(run(problem, nullptr, cpu::avx512::quantize_activation), quantized(problem));
  }
}

TEST_P(QuantizeActivation, UsesAGivenScaleAndClampsToIt) {
  const float scale = 0.00007F;
  EXPECT_EQ(run(problem(), &scale), quantized(problem(), &scale));
}

INSTANTIATE_TEST_SUITE_P(All, QuantizeActivation,
                         ::testing::Combine(::testing::Values(0, 1, 5),
                                            ::testing::Values(0, 1, 17, 64, 577), kFloats));

TEST(QuantizeActivation, AZeroRowHasTheSmallestScaleAndCodesZero) {
  Problem problem({.rows = 2, .cols = 21});
  for (std::int64_t col = 0; col < 21; ++col) problem.set(1, col, -0.0F);
  const Quantized result = run(problem);
  EXPECT_EQ(result, quantized(problem));
  EXPECT_EQ(result.scales[1], min_scale(DType::kFloat32));
}

TEST(QuantizeActivation, ARowThatHoldsANaNOrAnInfinityIsNaNThroughout) {
  for (const float bad : {kNaN, kInfinity, -kInfinity}) {
    Problem problem({.rows = 3, .cols = 37});
    problem.set(1, 36, bad);
    const Quantized result = run(problem);
    EXPECT_EQ(result, quantized(problem));
    EXPECT_TRUE(std::isnan(result.scales[1]));
    EXPECT_FALSE(std::isnan(result.scales[0]));
  }
}

TEST(QuantizeActivation, UnderAGivenScaleOnlyTheNaNItselfIsNaN) {
  Problem problem({.rows = 1, .cols = 37});
  problem.set(0, 3, kNaN);
  problem.set(0, 35, kNaN);
  problem.set(0, 36, kInfinity);
  const float scale = 0.001F;
  const Quantized result = run(problem, &scale);
  EXPECT_EQ(result, quantized(problem, &scale));
  EXPECT_EQ(result.codes[3], 0);
  EXPECT_EQ(result.codes[36], 127);
}

TEST(QuantizeActivation, SeveralThreadsGiveTheSameBits) {
  const Problem problem({.rows = 203, .cols = 577});
  const ThreadScope threads(4);
  EXPECT_EQ(run(problem), quantized(problem));
}

TEST(QuantizeActivation, RefusesIntegers) {
  try {
    cpu::quantize_activation({.rows = 1, .cols = 1, .input_dtype = DType::kInt32});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "quantize_activation: input must be float32, float16 or bfloat16, got int32");
  }
}

// ------------------------------------------------------------------------------- absmax of rows

class RowAbsmax : public ::testing::TestWithParam<std::tuple<std::int64_t, std::int64_t>> {
 protected:
  using Body = std::function<void(const RowAbsmaxArgs&)>;

  std::vector<float> run(const Body& body = cpu::row_absmax) const {
    const Case& c = problem_.parameters;
    std::vector<float> absmax(static_cast<std::size_t>(c.rows), -1.0F);
    body({.input = reinterpret_cast<const float*>(problem_.input.data()),
          .absmax = absmax.data(),
          .rows = c.rows,
          .cols = c.cols,
          .row_stride = problem_.row_stride});
    return absmax;
  }

  std::vector<float> by_definition() const {
    std::vector<float> absmax;
    for (std::int64_t row = 0; row < problem_.parameters.rows; ++row) {
      absmax.push_back(0.0F);
      for (std::int64_t col = 0; col < problem_.parameters.cols; ++col) {
        absmax.back() = std::max(absmax.back(), std::fabs(problem_.get(row, col)));
      }
    }
    return absmax;
  }

  Problem problem_ = Problem({.rows = std::get<0>(GetParam()), .cols = std::get<1>(GetParam())});
};

TEST_P(RowAbsmax, IsTheLargestMagnitudeOfEachRow) {
  const ThreadScope threads(3);
  EXPECT_EQ(run(), by_definition());
}

TEST_P(RowAbsmax, IsTheSameWithEveryInstructionSet) {
  EXPECT_EQ(run(cpu::scalar::row_absmax), by_definition());
  if (cpu::active_isa() >= cpu::Isa::kAvx2) {
    EXPECT_EQ(run(cpu::avx2::row_absmax), by_definition());
  }
  if (cpu::active_isa() >= cpu::Isa::kAvx512) {
    EXPECT_EQ(run(cpu::avx512::row_absmax), by_definition());
  }
}

TEST_P(RowAbsmax, KeepsEveryNaNAndInfinity) {
  const auto [rows, cols] = GetParam();
  for (std::int64_t row = 0; row < rows && cols > 0; ++row) {
    problem_.set(row, row % cols, row % 3 == 0 ? -kNaN : row % 3 == 1 ? kNaN : -kInfinity);
    problem_.set(row, (row * 7 + 1) % cols, problem_.get(row, row % cols));
  }
  const std::vector<float> absmax = run();
  for (std::size_t row = 0; row < absmax.size() && cols > 0; ++row) {
    EXPECT_EQ(std::isnan(absmax[row]), row % 3 != 2) << absmax[row];
    EXPECT_GE(std::bit_cast<std::int32_t>(absmax[row]), kInfinityBits);
  }
}

INSTANTIATE_TEST_SUITE_P(All, RowAbsmax,
                         ::testing::Combine(::testing::Values(0, 1, 5, 203),
                                            ::testing::Values(0, 1, 17, 64, 577)));

TEST(RowAbsmax, RefusesANegativeShape) {
  try {
    cpu::row_absmax({.rows = 2, .cols = -1});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "row_absmax: shape must be >= 0, got 2 x -1");
  }
}

// ------------------------------------------------------------------------------ codes to weights

class Dequantize : public ::testing::TestWithParam<Axes> {};

TEST_P(Dequantize, RestoresWhatFakeQuantizeWrote) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Case c = case_of(GetParam());
    c.codes_dtype = dtype == DType::kFloat16 ? DType::kInt16 : DType::kInt8;
    c.input_dtype = c.output_dtype = c.scale_dtype = dtype;
    const Problem problem(c);
    const Result simulated = reference(problem);
    Result restored = problem.blank;
    cpu::dequantize({.codes = simulated.codes.data(),
                     .scales = simulated.scales.data(),
                     .zero_points = simulated.zero_points.data(),
                     .output = restored.output.data(),
                     .rows = c.rows,
                     .cols = c.cols,
                     .row_stride = problem.row_stride,
                     .col_stride = problem.col_stride,
                     .group_size = c.group_size,
                     .codes_dtype = c.codes_dtype,
                     .scale_dtype = c.scale_dtype,
                     .output_dtype = c.output_dtype,
                     .granularity = c.granularity});
    EXPECT_EQ(restored.output, simulated.output) << moq::name_of(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Dequantize,
                         ::testing::Combine(kShapes, kStorages, kGranularities, kModes,
                                            ::testing::Values(Rounding::kNearest)),
                         axes_name);

TEST(Dequantize, RefusesAGroupSizeThatDoesNotDivideTheColumns) {
  try {
    cpu::dequantize(
        {.rows = 1, .cols = 10, .group_size = 4, .granularity = Granularity::kPerGroup});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "dequantize: group_size must divide the columns, got 4 and 10");
  }
}

TEST(NameHash, IsFnv1a) {  // the vectors of the authors' page
  EXPECT_EQ(name_hash(""), 0x811c9dc5U);
  EXPECT_EQ(name_hash("a"), 0xe40c292cU);
  EXPECT_EQ(name_hash("foobar"), 0xbf9cf968U);
}

}  // namespace
}  // namespace moq::kernels::testing
