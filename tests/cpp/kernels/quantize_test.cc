#include "kernels/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels/common/name_hash.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/quantize.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/fake_quantize_axes.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"
#include "tests/cpp/kernels/isa_axis.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// The grid that quantize_activation is asked for.
struct Grid {
  std::optional<float> scale = std::nullopt;  ///< nullopt: each row its own
  QuantMode mode = QuantMode::kSymmetric;
  std::int32_t zero_point = 0;
};

constexpr QuantMode kInputModes[] = {QuantMode::kSymmetric, QuantMode::kAsymmetric};

/// What quantize_activation writes.
struct Quantized {
  std::vector<std::int8_t> codes;
  std::vector<float> scales;
  std::vector<std::int32_t> zero_points;
  std::vector<std::byte> output;
};

/// Scales as bit patterns, so that NaN equals NaN.
bool operator==(const Quantized& a, const Quantized& b) {
  const auto bits = [](float scale) { return std::bit_cast<std::uint32_t>(scale); };
  return a.codes == b.codes && a.output == b.output && a.zero_points == b.zero_points &&
         std::ranges::equal(a.scales, b.scales, {}, bits, bits);
}

/// The bodies of a device; a build without CUDA skips before it gets here.
void quantize_activation(Device device, const QuantizeActivationArgs& args) {
  if (device == Device::kCpu) {
    return cpu::quantize_activation(args);
  }
#if defined(MOQ_WITH_CUDA)
  cuda::quantize_activation(args, nullptr);
#endif
}

void dequantize(Device device, const DequantizeArgs& args) {
  if (device == Device::kCpu) {
    return cpu::dequantize(args);
  }
#if defined(MOQ_WITH_CUDA)
  cuda::dequantize(args, nullptr);
#endif
}

/// Runs a body of quantize_activation over the rows of a problem in linear storage.
template <typename Body>
Quantized run(Device device, const Problem& problem, const Grid& grid, const Body& body) {
  const Case& c = problem.parameters;
  const auto rows = static_cast<std::size_t>(c.rows);
  const auto size = static_cast<std::size_t>(c.rows * c.cols);
  const OnDevice<std::byte> input(device, problem.input);
  const OnDevice<std::int8_t> codes(device, std::vector<std::int8_t>(size, 99));
  const OnDevice<float> scales(device, std::vector<float>(rows, -1.0F));
  const OnDevice<std::int32_t> zero_points(device, std::vector<std::int32_t>(rows, 999));
  const OnDevice<std::byte> output(device, std::vector<std::byte>(size * size_of(c.input_dtype)));
  const OnDevice<float> scale(device, {grid.scale.value_or(0.0F)});
  const OnDevice<std::int32_t> zero_point(device, {grid.zero_point});
  const bool gives_zero_point = grid.scale.has_value() && !is_symmetric(grid.mode);
  body({.input = input.data(),
        .codes = codes.data(),
        .scales = scales.data(),
        .zero_points = zero_points.data(),
        .output = output.data(),
        .static_scale = grid.scale.has_value() ? scale.data() : nullptr,
        .static_zero_point = gives_zero_point ? zero_point.data() : nullptr,
        .rows = c.rows,
        .cols = c.cols,
        .row_stride = problem.row_stride,
        .input_dtype = c.input_dtype,
        .mode = grid.mode});
  return {codes.read(), scales.read(), zero_points.read(), output.read()};
}

Quantized run(Device device, const Problem& problem, const Grid& grid = {}) {
  return run(device, problem, grid,
             [&](const QuantizeActivationArgs& args) { quantize_activation(device, args); });
}

/// The formulas of kernels/quantize.h, one element at a time.
Quantized quantized(const Problem& problem, const Grid& asked = {}) {
  const Case& c = problem.parameters;
  const auto size = static_cast<std::size_t>(c.rows * c.cols);
  Quantized result{std::vector<std::int8_t>(size),
                   std::vector<float>(static_cast<std::size_t>(c.rows), -1.0F),
                   std::vector<std::int32_t>(static_cast<std::size_t>(c.rows), 999),
                   std::vector<std::byte>(size * size_of(c.input_dtype))};
  const bool dynamic = !asked.scale.has_value();
  for (std::int64_t row = 0; row < c.rows; ++row) {
    float lowest = 0.0F;
    float highest = 0.0F;
    bool finite = true;
    for (std::int64_t col = 0; col < c.cols; ++col) {
      lowest = std::fmin(lowest, problem.get(row, col));
      highest = std::fmax(highest, problem.get(row, col));
      finite = finite && std::isfinite(problem.get(row, col));
    }
    const GridParams grid = dynamic ? make_grid(lowest, highest, 8, asked.mode, DType::kFloat32)
                                    : grid_of_scale(*asked.scale, 8, asked.mode, asked.zero_point);
    const bool row_is_bad = !finite && dynamic;
    if (dynamic) {
      result.scales[static_cast<std::size_t>(row)] = row_is_bad ? kNaN : grid.scale;
      result.zero_points[static_cast<std::size_t>(row)] = row_is_bad ? 0 : grid.zero_point;
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

using Rows = std::tuple<std::int64_t, std::int64_t, DType>;

Problem problem_of(const Rows& parameters) {
  const auto& [rows, cols, dtype] = parameters;
  return Problem({.rows = rows, .cols = cols, .input_dtype = dtype});
}

std::string describe_rows(const Rows& parameters) {
  const auto& [rows, cols, dtype] = parameters;
  return std::to_string(rows) + "x" + std::to_string(cols) + "_" + moq::name_of(dtype);
}

const auto kRows =
    ::testing::Combine(::testing::Values(0, 1, 5), ::testing::Values(0, 1, 17, 64, 577), kFloats);

class QuantizeActivationEveryShape : public ::testing::TestWithParam<std::tuple<Device, Rows>> {
 protected:
  Device device_ = std::get<0>(GetParam());
  Problem problem_ = problem_of(std::get<1>(GetParam()));
};

TEST_P(QuantizeActivationEveryShape, GivesTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT(device_);
  for (const QuantMode mode : kInputModes) {
    EXPECT_EQ(run(device_, problem_, {.mode = mode}), quantized(problem_, {.mode = mode}));
  }
}

TEST_P(QuantizeActivationEveryShape, UsesAGivenGridAndClampsToIt) {
  MOQ_SKIP_WITHOUT(device_);
  const Grid symmetric{.scale = 0.00007F};
  EXPECT_EQ(run(device_, problem_, symmetric), quantized(problem_, symmetric));
  for (const std::int32_t zero_point : {-128, -37, 0, 127}) {
    const Grid grid{.scale = 0.00007F, .mode = QuantMode::kAsymmetric, .zero_point = zero_point};
    EXPECT_EQ(run(device_, problem_, grid), quantized(problem_, grid));
  }
}

INSTANTIATE_TEST_SUITE_P(All, QuantizeActivationEveryShape, ::testing::Combine(kDevices, kRows),
                         [](const auto& info) {
                           return name_of(std::get<Device>(info.param)) + "_" +
                                  describe_rows(std::get<Rows>(info.param));
                         });

class QuantizeActivationEveryInstructionSet
    : public ::testing::TestWithParam<std::tuple<cpu::Isa, Rows>> {};

TEST_P(QuantizeActivationEveryInstructionSet, GivesTheBitsOfTheDefinition) {
  const auto& [isa, rows] = GetParam();
  MOQ_SKIP_WITHOUT_ISA(isa);
  const Problem problem = problem_of(rows);
  for (const QuantMode mode : kInputModes) {
    const Grid grid{.mode = mode};
    EXPECT_EQ(run(Device::kCpu, problem, grid, MOQ_FUNCTION_OF(isa, quantize_activation)),
              quantized(problem, grid));
  }
  const Grid given{.scale = 0.00007F, .mode = QuantMode::kAsymmetric, .zero_point = 100};
  EXPECT_EQ(run(Device::kCpu, problem, given, MOQ_FUNCTION_OF(isa, quantize_activation)),
            quantized(problem, given));
}

INSTANTIATE_TEST_SUITE_P(All, QuantizeActivationEveryInstructionSet,
                         ::testing::Combine(kIsas, kRows), [](const auto& info) {
                           return std::string(cpu::name_of(std::get<cpu::Isa>(info.param))) + "_" +
                                  describe_rows(std::get<Rows>(info.param));
                         });

class QuantizeActivation : public ::testing::TestWithParam<Device> {};

TEST_P(QuantizeActivation, AZeroRowHasTheSmallestScaleAndTheCodesOfZero) {
  MOQ_SKIP_WITHOUT(GetParam());
  Problem problem({.rows = 2, .cols = 21});
  for (std::int64_t col = 0; col < 21; ++col) problem.set(1, col, -0.0F);
  for (const QuantMode mode : kInputModes) {
    const Quantized result = run(GetParam(), problem, {.mode = mode});
    EXPECT_EQ(result, quantized(problem, {.mode = mode}));
    EXPECT_EQ(result.scales[1], min_scale(DType::kFloat32));
    EXPECT_EQ(result.zero_points[1], is_symmetric(mode) ? 0 : -128);
    EXPECT_EQ(result.codes[21], result.zero_points[1]);
  }
}

TEST_P(QuantizeActivation, ARowThatHoldsANaNOrAnInfinityIsNaNThroughout) {
  MOQ_SKIP_WITHOUT(GetParam());
  for (const float bad : {kNaN, kInfinity, -kInfinity}) {
    Problem problem({.rows = 3, .cols = 37});
    problem.set(1, 36, bad);
    for (const QuantMode mode : kInputModes) {
      const Quantized result = run(GetParam(), problem, {.mode = mode});
      EXPECT_EQ(result, quantized(problem, {.mode = mode}));
      EXPECT_TRUE(std::isnan(result.scales[1]));
      EXPECT_FALSE(std::isnan(result.scales[0]));
    }
  }
}

TEST_P(QuantizeActivation, UnderAGivenScaleOnlyTheNaNItselfIsNaN) {
  MOQ_SKIP_WITHOUT(GetParam());
  Problem problem({.rows = 1, .cols = 37});
  problem.set(0, 3, kNaN);
  problem.set(0, 35, kNaN);
  problem.set(0, 36, kInfinity);
  for (const QuantMode mode : kInputModes) {
    const Grid grid{.scale = 0.001F, .mode = mode, .zero_point = is_symmetric(mode) ? 0 : 9};
    const Quantized result = run(GetParam(), problem, grid);
    EXPECT_EQ(result, quantized(problem, grid));
    EXPECT_EQ(result.codes[3], 0);
    EXPECT_EQ(result.codes[36], 127);
  }
}

TEST_P(QuantizeActivation, UsesTheSmallestScaleThatHasAGrid) {
  MOQ_SKIP_WITHOUT(GetParam());
  Problem problem({.rows = 1, .cols = 37});
  problem.set(0, 3, 3e-38F);
  const float scale = min_scale(DType::kFloat32);
  EXPECT_EQ(run(GetParam(), problem, {scale}), quantized(problem, {scale}));
}

TEST_P(QuantizeActivation, RefusesIntegers) {
  MOQ_SKIP_WITHOUT(GetParam());
  EXPECT_EQ(error_of([&] {
              quantize_activation(GetParam(), {.rows = 1, .cols = 1, .input_dtype = DType::kInt32});
            }),
            "quantize_activation: input must be float32, float16 or bfloat16, got int32");
}

INSTANTIATE_TEST_SUITE_P(All, QuantizeActivation, kDevices,
                         [](const auto& info) { return name_of(info.param); });

TEST(QuantizeActivationGrid, RefusesAZeroPointBeyondTheCodesOnTheCpu) {
  const Problem problem({.rows = 2, .cols = 5});
  for (const std::int32_t zero_point : {-129, 128}) {
    const Grid grid{.scale = 0.1F, .mode = QuantMode::kAsymmetric, .zero_point = zero_point};
    EXPECT_EQ(error_of([&] { run(Device::kCpu, problem, grid); }),
              "quantize_activation: a given zero point must lie in [-128, 127], got " +
                  std::to_string(zero_point));
  }
}

TEST_P(QuantizeActivation, RefusesAZeroPointWithoutAScaleAndAnAsymmetricScaleWithoutOne) {
  MOQ_SKIP_WITHOUT(GetParam());
  const std::string message =
      "quantize_activation: a zero point must come with a given scale in asymmetric mode, and only "
      "then, got ";
  const float scale = 0.1F;
  const std::int32_t zero_point = 3;
  QuantizeActivationArgs args{.static_zero_point = &zero_point, .mode = QuantMode::kAsymmetric};
  const auto error = [&] { return error_of([&] { quantize_activation(GetParam(), args); }); };
  EXPECT_EQ(error(), message + "one");
  args = {.static_scale = &scale, .static_zero_point = &zero_point};
  EXPECT_EQ(error(), message + "one");
  args = {.static_scale = &scale, .mode = QuantMode::kAsymmetric};
  EXPECT_EQ(error(), message + "none");
  EXPECT_EQ(error_of([&] { quantize_activation(GetParam(), {.mode = QuantMode::kTernary}); }),
            "quantize_activation: mode must be symmetric or asymmetric, got another");
}

class GivenScaleWithoutAGrid : public ::testing::TestWithParam<float> {};

TEST_P(GivenScaleWithoutAGrid, IsRefusedOnTheCpu) {
  const float scale = GetParam();
  const Problem problem({.rows = 2, .cols = 5});
  const std::string error = error_of([&] { run(Device::kCpu, problem, {scale}); });
  EXPECT_TRUE(
      error.starts_with("quantize_activation: a given scale must be finite and >= "
                        "1.17549e-38, got "))
      << error;
}

TEST_P(GivenScaleWithoutAGrid, GivesNaNAndCodesZeroOnCuda) {
  MOQ_SKIP_WITHOUT(Device::kCuda);
  const float scale = GetParam();
  const Problem problem({.rows = 2, .cols = 5});
  Quantized result = run(Device::kCuda, problem, {scale});
  Quantized expected = result;
  expected.codes.assign(10, 0);
  for (std::size_t i = 0; i < 10; ++i) {
    put_float(expected.output, DType::kFloat32, i, kNaN);
  }
  EXPECT_EQ(result, expected);
  for (const std::int32_t zero_point : {-129, 128}) {
    result = run(Device::kCuda, problem,
                 {.scale = 0.1F, .mode = QuantMode::kAsymmetric, .zero_point = zero_point});
    EXPECT_EQ(result, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Values, GivenScaleWithoutAGrid,
                         ::testing::Values(0.0F, -0.0F, -0.01F, 1e-39F, kInfinity, -kInfinity,
                                           kNaN));

TEST(QuantizeActivationOnThreads, GivesTheSameBits) {
  const Problem problem({.rows = 203, .cols = 577});
  const ThreadScope threads(4);
  EXPECT_EQ(run(Device::kCpu, problem), quantized(problem));
}

// ------------------------------------------------------------------------------ extents of rows

class RowExtents
    : public ::testing::TestWithParam<std::tuple<cpu::Isa, std::int64_t, std::int64_t, QuantMode>> {
 protected:
  bool symmetric() const { return is_symmetric(mode_); }

  /// [rows] or [2, rows]
  template <typename Body>
  std::vector<float> run(const Body& body) const {
    const Case& c = problem_.parameters;
    std::vector<float> extents(static_cast<std::size_t>(symmetric() ? c.rows : 2 * c.rows), -1.0F);
    body({.input = reinterpret_cast<const float*>(problem_.input.data()),
          .extents = extents.data(),
          .mode = mode_,
          .rows = c.rows,
          .cols = c.cols,
          .row_stride = problem_.row_stride});
    return extents;
  }

  std::vector<float> run_on_isa() const {
    return run([&](const RowExtentsArgs& args) {
      MOQ_FUNCTION_OF(isa_, row_extents)(args, 0, args.rows);
    });
  }

  cpu::Isa isa_ = std::get<0>(GetParam());
  QuantMode mode_ = std::get<3>(GetParam());
  Problem problem_ = Problem({.rows = std::get<1>(GetParam()), .cols = std::get<2>(GetParam())});
};

TEST_P(RowExtents, AreTheLargestMagnitudesOfEachRow) {
  MOQ_SKIP_WITHOUT_ISA(isa_);
  const std::int64_t rows = problem_.parameters.rows;
  std::vector<float> expected(static_cast<std::size_t>(symmetric() ? rows : 2 * rows), 0.0F);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < problem_.parameters.cols; ++col) {
      const float value = problem_.get(row, col);
      float& extent =
          expected[static_cast<std::size_t>(symmetric() || value < 0.0F ? row : rows + row)];
      extent = std::max(extent, std::fabs(value));
    }
  }
  EXPECT_EQ(run_on_isa(), expected);
  const ThreadScope threads(3);
  EXPECT_EQ(run(cpu::row_extents), expected);
}

TEST_P(RowExtents, KeepEveryNaNAndInfinity) {
  MOQ_SKIP_WITHOUT_ISA(isa_);
  const auto [isa, rows, cols, mode] = GetParam();
  for (std::int64_t row = 0; row < rows && cols > 0; ++row) {
    problem_.set(row, row % cols, row % 3 == 0 ? -kNaN : row % 3 == 1 ? kNaN : -kInfinity);
    problem_.set(row, (row * 7 + 1) % cols, problem_.get(row, row % cols));
  }
  const std::vector<float> extents = run_on_isa();
  for (std::int64_t row = 0; row < rows && cols > 0; ++row) {
    const auto bits = [&](std::int64_t i) {
      return std::bit_cast<std::int32_t>(extents[static_cast<std::size_t>(i)]);
    };
    const std::int32_t largest = symmetric() ? bits(row) : std::max(bits(row), bits(rows + row));
    EXPECT_EQ(largest > kInfinityBits, row % 3 != 2) << largest;
    EXPECT_GE(largest, kInfinityBits);
    const GroupExtents own{
        .below = extents[static_cast<std::size_t>(row)],
        .above = extents[static_cast<std::size_t>(symmetric() ? row : rows + row)]};
    EXPECT_TRUE(has_nonfinite(statistics_of(own, mode)));
  }
}

TEST_P(RowExtents, MakeTheGridThatTheRowMakes) {
  MOQ_SKIP_WITHOUT_ISA(isa_);
  const std::int64_t rows = problem_.parameters.rows;
  const std::vector<float> extents = run_on_isa();
  const Quantized expected = quantized(problem_, {.mode = mode_});
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto below = static_cast<std::size_t>(row);
    const auto above = static_cast<std::size_t>(symmetric() ? row : rows + row);
    const GridParams grid = make_grid(statistics_of({extents[below], extents[above]}, mode_), 8,
                                      mode_, DType::kFloat32);
    EXPECT_EQ(grid.scale, expected.scales[below]);
    EXPECT_EQ(grid.zero_point, expected.zero_points[below]);
  }
}

INSTANTIATE_TEST_SUITE_P(All, RowExtents,
                         ::testing::Combine(kIsas, ::testing::Values(0, 1, 5, 203),
                                            ::testing::Values(0, 1, 17, 64, 577),
                                            ::testing::ValuesIn(kInputModes)),
                         [](const auto& info) {
                           return std::string(cpu::name_of(std::get<0>(info.param))) + "_" +
                                  std::to_string(std::get<1>(info.param)) + "x" +
                                  std::to_string(std::get<2>(info.param)) +
                                  (is_symmetric(std::get<3>(info.param)) ? "" : "_asymmetric");
                         });

TEST(RowExtentsErrors, RefuseANegativeShape) {
  EXPECT_EQ(error_of([&] { cpu::row_extents({.rows = 2, .cols = -1}); }),
            "row_extents: shape must be >= 0, got 2 x -1");
}

// ------------------------------------------------------------------------------ codes to weights

/// Restores the codes of `simulated`, in the layout of `problem`.
std::vector<std::byte> restored(Device device, const Problem& problem, const Result& simulated) {
  const Case& c = problem.parameters;
  const OnDevice<std::byte> codes(device, simulated.codes);
  const OnDevice<std::byte> scales(device, simulated.scales);
  const OnDevice<std::int32_t> zero_points(device, simulated.zero_points);
  const OnDevice<std::byte> output(device, problem.blank.output);
  dequantize(device, {.codes = codes.data(),
                      .scales = scales.data(),
                      .zero_points = zero_points.data(),
                      .output = output.data(),
                      .rows = c.rows,
                      .cols = c.cols,
                      .row_stride = problem.row_stride,
                      .col_stride = problem.col_stride,
                      .group_size = c.group_size,
                      .codes_dtype = c.codes_dtype,
                      .scale_dtype = c.scale_dtype,
                      .output_dtype = c.output_dtype,
                      .granularity = c.granularity});
  return output.read();
}

class DequantizeEveryAxis : public ::testing::TestWithParam<std::tuple<Device, Axes>> {};

TEST_P(DequantizeEveryAxis, RestoresWhatFakeQuantizeWrote) {
  const auto& [device, axes] = GetParam();
  MOQ_SKIP_WITHOUT(device);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Case c = case_of(axes);
    c.codes_dtype = dtype == DType::kFloat16 ? DType::kInt16 : DType::kInt8;
    c.input_dtype = c.output_dtype = c.scale_dtype = dtype;
    const Problem problem(c);
    const Result simulated = reference(problem);
    EXPECT_EQ(restored(device, problem, simulated), simulated.output) << moq::name_of(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, DequantizeEveryAxis,
    ::testing::Combine(kDevices, ::testing::Combine(kShapes, kStorages, kGranularities, kModes,
                                                    ::testing::Values(Rounding::kNearest))),
    [](const auto& info) {
      return name_of(std::get<Device>(info.param)) + "_" +
             describe(case_of(std::get<Axes>(info.param)));
    });

class Dequantize : public ::testing::TestWithParam<Device> {};

TEST_P(Dequantize, EveryNaNIsTheCanonicalOne) {
  MOQ_SKIP_WITHOUT(GetParam());
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Problem problem({.rows = 4, .cols = 19, .output_dtype = dtype});
    Result simulated = reference(problem);
    const std::uint32_t scales[] = {0x7fc12345U, 0xffc00000U, 0x7f812345U, 0x7f800000U};
    std::memcpy(simulated.scales.data(), scales, sizeof(scales));
    simulated.codes.assign(simulated.codes.size(), std::byte{0});
    for (std::int64_t row = 0; row < 4; ++row) {
      for (std::int64_t col = 0; col < 19; ++col) {
        put_float(simulated.output, dtype, problem.place(row, col), kNaN);
      }
    }
    EXPECT_EQ(restored(GetParam(), problem, simulated), simulated.output) << moq::name_of(dtype);
  }
}

TEST_P(Dequantize, RefusesAGroupSizeThatDoesNotDivideTheColumns) {
  MOQ_SKIP_WITHOUT(GetParam());
  EXPECT_EQ(error_of([&] {
              dequantize(
                  GetParam(),
                  {.rows = 1, .cols = 10, .group_size = 4, .granularity = Granularity::kPerGroup});
            }),
            "dequantize: group_size must divide the columns, got 4 and 10");
}

INSTANTIATE_TEST_SUITE_P(All, Dequantize, kDevices,
                         [](const auto& info) { return name_of(info.param); });

TEST(NameHash, IsFnv1a) {  // the vectors of the authors' page
  EXPECT_EQ(name_hash(""), 0x811c9dc5U);
  EXPECT_EQ(name_hash("a"), 0xe40c292cU);
  EXPECT_EQ(name_hash("foobar"), 0xbf9cf968U);
}

}  // namespace
}  // namespace moq::kernels::testing
