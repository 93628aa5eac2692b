// The norms on a GPU against their definition in float64, no farther from it than twice the CPU's
// float32 and one rounding; the 8-bit codes against the CPU's, exactly.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/float_support.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;
using test::normal_vector;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Shape {
  std::int64_t num_tokens;
  std::int64_t hidden_size;
};

/// Rows that are to be normalised, and how they lie in memory.
struct Problem {
  Shape shape;
  DType dtype = DType::kFloat16;
  NormKind kind = NormKind::kLayerNorm;
  bool with_bias = true;
  std::int64_t padding = 0;  ///< elements behind each row
  std::int64_t offset = 0;   ///< elements before the first
  std::vector<std::int32_t> rows = {};
  bool in_place = false;
  bool unrounded = false;  ///< float32 results
  InputRounding rounding = {};
  float epsilon = 1e-5F;

  std::vector<float> input = {};
  std::vector<float> weight = {};
  std::vector<float> bias = {};

  /// Numbers far from zero: a variance must not be the difference of squares.
  void fill(float mean = 20.0F) {
    const std::int64_t num_rows =
        rows.empty() ? shape.num_tokens : 1 + *std::max_element(rows.begin(), rows.end());
    input = normal_vector(num_rows * shape.hidden_size, 1, 3.0F);
    for (float& value : input) {
      value += mean;
    }
    input = rounded(input, dtype);
    weight = normal_vector(shape.hidden_size, 2);
    bias = normal_vector(shape.hidden_size, 3);
  }
  DType output_dtype() const { return unrounded ? DType::kFloat32 : dtype; }
  bool has_bias() const { return with_bias && kind == NormKind::kLayerNorm; }
  std::int64_t row(std::int64_t token) const {
    return rows.empty() ? token : rows[static_cast<std::size_t>(token)];
  }
};

struct Result {
  std::vector<float> output;  ///< [num_tokens, hidden_size]
  std::vector<float> scales;
};

Result run(const Problem& problem) {
  const auto [num_tokens, n] = problem.shape;
  const std::int64_t stride = n + problem.padding;
  const auto offset_bytes = [&](DType dtype) {
    return static_cast<std::size_t>(problem.offset) * size_of(dtype);
  };
  const auto memory = [&](const std::vector<float>& values, DType dtype) {
    const std::int64_t num_rows = std::ssize(values) / n;
    return to_bytes(spread(values, num_rows, n, problem.padding, problem.offset), dtype);
  };
  const OnDevice<std::byte> input(Device::kCuda, memory(problem.input, problem.dtype));
  const OnDevice<std::byte> other(
      Device::kCuda, memory(std::vector<float>(num_tokens * n, kNan), problem.output_dtype()));
  const OnDevice<std::byte>& output = problem.in_place ? input : other;
  const OnDevice<std::int32_t> rows(Device::kCuda, problem.rows);
  const OnDevice<float> weight(Device::kCuda, problem.weight);
  const OnDevice<float> bias(Device::kCuda, problem.bias);
  const OnDevice<float> scales(Device::kCuda, std::vector<float>(num_tokens, -1.0F));
  cuda::norm({.input = input.data() + offset_bytes(problem.dtype),
              .input_stride = stride,
              .rows = problem.rows.empty() ? nullptr : rows.data(),
              .norm = {.kind = problem.kind,
                       .weight = weight.data(),
                       .bias = problem.has_bias() ? bias.data() : nullptr,
                       .epsilon = problem.epsilon},
              .output = output.data() + offset_bytes(problem.output_dtype()),
              .float32_output = problem.unrounded,
              .output_stride = stride,
              .rounding = problem.rounding,
              .row_scales = problem.rounding.mode != InputMode::kFloat32 ? scales.data() : nullptr,
              .num_tokens = num_tokens,
              .hidden_size = n,
              .dtype = problem.dtype},
             nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  const std::vector<float> wide = from_bytes(output.read(), problem.output_dtype());
  Result result{{}, scales.read()};
  for (std::int64_t i = 0; i < std::ssize(wide); ++i) {
    const std::int64_t col = (i - problem.offset) % stride;
    if (i >= problem.offset && col < n) {
      result.output.push_back(wide[i]);
    } else {
      EXPECT_EQ(wide[i], -7.0F) << "outside of the rows, at " << i;
    }
  }
  return result;
}

/// The definition in float64, [num_tokens, hidden_size].
std::vector<double> exact(const Problem& problem) {
  const auto [num_tokens, n] = problem.shape;
  std::vector<double> output;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const float* x = problem.input.data() + problem.row(t) * n;
    double mean = 0.0;
    double variance = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
      mean += problem.kind == NormKind::kLayerNorm ? x[j] / static_cast<double>(n) : 0.0;
    }
    for (std::int64_t j = 0; j < n; ++j) {
      variance += (x[j] - mean) * (x[j] - mean) / static_cast<double>(n);
    }
    const double deviation = std::sqrt(variance + static_cast<double>(problem.epsilon));
    for (std::int64_t j = 0; j < n; ++j) {
      const double value = (x[j] - mean) / deviation * problem.weight[j];
      output.push_back(problem.kind == NormKind::kNone
                           ? x[j]
                           : value + (problem.has_bias() ? problem.bias[j] : 0.0));
    }
  }
  return output;
}

/// The CPU's float32, [num_tokens, hidden_size].
std::vector<float> on_cpu(const Problem& problem) {
  const auto [num_tokens, n] = problem.shape;
  std::vector<float> output;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const float* x = problem.input.data() + problem.row(t) * n;
    output.insert(output.end(), x, x + n);
  }
  const LayerNormArgs layer{.input = output.data(),
                            .weight = problem.weight.data(),
                            .bias = problem.has_bias() ? problem.bias.data() : nullptr,
                            .output = output.data(),
                            .num_tokens = num_tokens,
                            .hidden_size = n,
                            .epsilon = problem.epsilon};
  if (problem.kind == NormKind::kLayerNorm) {
    cpu::layer_norm(layer);
  } else if (problem.kind == NormKind::kRmsNorm) {
    cpu::rms_norm({.input = layer.input,
                   .weight = layer.weight,
                   .output = layer.output,
                   .num_tokens = num_tokens,
                   .hidden_size = n,
                   .epsilon = layer.epsilon});
  }
  return output;
}

void expect_accurate(const Problem& problem, const std::vector<float>& actual) {
  const std::vector<double> expected = exact(problem);
  const std::vector<float> naive = on_cpu(problem);
  ASSERT_EQ(actual.size(), expected.size());
  const double float32 = 2.0 * test::max_error<float>(naive, expected);
  const RoundingError rounding = rounding_error(problem.output_dtype());
  // rsqrtf is that many units in the last place off, the square root and quotient on a CPU none.
  constexpr double kInverseRoot = 2.0 * std::numeric_limits<float>::epsilon();
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double allowed = float32 +
                           (std::fabs(expected[i]) + float32) * (rounding.relative + kInverseRoot) +
                           rounding.absolute;
    ASSERT_LE(std::fabs(actual[i] - expected[i]), allowed)
        << "element " << i << ": " << actual[i] << ", expected " << expected[i];
  }
}

/// The codes of `values`, rows that are already rounded to the dtype, by the CPU's quantization.
void expect_codes(const Result& actual, const std::vector<float>& values, const Problem& problem) {
  const auto [num_tokens, hidden_size] = problem.shape;
  const auto& [mode, scale, zero_point] = problem.rounding;
  const bool asymmetric = grid_mode(mode) == QuantMode::kAsymmetric;
  std::vector<std::int8_t> codes(values.size());
  std::vector<float> scales(static_cast<std::size_t>(num_tokens), scale);
  std::vector<std::int32_t> zero_points(static_cast<std::size_t>(num_tokens), zero_point);
  cpu::quantize_activation(
      {.input = values.data(),
       .codes = codes.data(),
       .scales = scales.data(),
       .zero_points = zero_points.data(),
       .static_scale = is_static(mode) ? &scale : nullptr,
       .static_zero_point = is_static(mode) && asymmetric ? &zero_point : nullptr,
       .rows = num_tokens,
       .cols = hidden_size,
       .row_stride = hidden_size,
       .mode = grid_mode(mode)});
  std::vector<float> expected;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i) / hidden_size;
    expected.push_back(static_cast<float>(codes[i] - zero_points[static_cast<std::size_t>(row)]));
  }
  EXPECT_EQ(actual.output, expected) << name_of(mode);
  for (std::size_t t = 0; t < scales.size(); ++t) {
    EXPECT_TRUE(actual.scales[t] == scales[t] ||
                (std::isnan(actual.scales[t]) && std::isnan(scales[t])))
        << name_of(mode) << ", row " << t << ": " << actual.scales[t] << ", expected " << scales[t];
  }
}

constexpr InputMode kDynamicModes[] = {InputMode::kDynamicInt8, InputMode::kDynamicAsymmetricInt8};

/// Static grids of a step size.
std::vector<InputRounding> static_roundings(float scale) {
  return {{.mode = InputMode::kStaticInt8, .scale = scale},
          {.mode = InputMode::kStaticAsymmetricInt8, .scale = scale, .zero_point = -128},
          {.mode = InputMode::kStaticAsymmetricInt8, .scale = scale, .zero_point = 31},
          {.mode = InputMode::kStaticAsymmetricInt8, .scale = scale, .zero_point = 127}};
}

// ----------------------------------------------------------------------------------- every shape

class NormCuda : public ::testing::TestWithParam<std::tuple<Shape, DType, NormKind>> {
 protected:
  void SetUp() override {
    MOQ_SKIP_WITHOUT_GPU();
    problem.fill();
  }
  Problem problem{.shape = std::get<Shape>(GetParam()),
                  .dtype = std::get<DType>(GetParam()),
                  .kind = std::get<NormKind>(GetParam())};
};

TEST_P(NormCuda, IsTheDefinition) {
  expect_accurate(problem, run(problem).output);
}

TEST_P(NormCuda, ReadsAndWritesPaddedRowsFromAnyAddress) {
  problem.padding = 3;
  problem.offset = 1;
  expect_accurate(problem, run(problem).output);
}

TEST_P(NormCuda, GivesTheSameBitsInPlaceAndFromGatheredRows) {
  const std::vector<float> output = run(problem).output;
  problem.in_place = true;
  EXPECT_EQ(run(problem).output, output);
  problem.in_place = false;
  for (auto t = static_cast<std::int32_t>(problem.shape.num_tokens); t > 0; --t) {
    problem.rows.push_back(t - 1);
  }
  const std::vector<float> backwards = run(problem).output;
  const std::int64_t n = problem.shape.hidden_size;
  for (std::int64_t t = 0; t < problem.shape.num_tokens; ++t) {
    ASSERT_TRUE(std::equal(output.begin() + t * n, output.begin() + (t + 1) * n,
                           backwards.end() - (t + 1) * n))
        << "row " << t;
  }
}

TEST_P(NormCuda, WritesWhatItWouldRound) {
  const std::vector<float> output = run(problem).output;
  problem.unrounded = true;
  problem.padding = 3;
  for (const std::int64_t offset : {0, 1}) {
    problem.offset = offset;
    const std::vector<float> unrounded = run(problem).output;
    expect_accurate(problem, unrounded);
    if (problem.kind == NormKind::kNone) {  // statistics may be summed in another order
      EXPECT_EQ(unrounded, output);
    }
  }
  problem.padding = problem.offset = 0;
  EXPECT_EQ(rounded(run(problem).output, problem.dtype), output);
}

TEST_P(NormCuda, RoundsToTheGridOfEachRow) {
  const std::vector<float> values = run(problem).output;
  for (const InputMode mode : kDynamicModes) {
    problem.rounding = {.mode = mode};
    problem.in_place = false;
    expect_codes(run(problem), values, problem);
    problem.in_place = true;
    expect_codes(run(problem), values, problem);
  }
}

TEST_P(NormCuda, RoundsToAGivenGrid) {
  const std::vector<float> values = run(problem).output;
  const float scale = problem.kind == NormKind::kNone ? 0.17F : 0.02F;  // some are beyond it
  for (const InputRounding& rounding : static_roundings(scale)) {
    problem.rounding = rounding;
    problem.padding = problem.offset = 0;
    problem.in_place = false;
    expect_codes(run(problem), values, problem);
    problem.padding = 3;
    problem.offset = 1;
    problem.in_place = true;
    if (problem.kind == NormKind::kNone) {  // statistics may be summed in another order there
      expect_codes(run(problem), values, problem);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, NormCuda,
    ::testing::Combine(
        ::testing::Values(Shape{1, 1}, Shape{3, 7}, Shape{5, 8}, Shape{9, 97}, Shape{1, 768},
                          Shape{131, 768}, Shape{7, 1032}, Shape{17, 1600}, Shape{3, 4096},
                          Shape{2, 4099}, Shape{2, 12288}, Shape{1, 16384}, Shape{3, 65536},
                          Shape{2, 65537}),
        ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
        ::testing::Values(NormKind::kNone, NormKind::kLayerNorm, NormKind::kRmsNorm)));

// ------------------------------------------------------------------------------------------ rest

class NormCudaArgs : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(NormCudaArgs, ARowGivesTheSameBitsAmongAFewRows) {
  for (const std::int64_t hidden_size : {768, 5120}) {
    Problem many{.shape = {200, hidden_size}};
    many.fill();
    const std::vector<float> all = run(many).output;
    for (const std::int32_t row : {0, 1, 123, 199}) {
      Problem one = many;
      one.shape.num_tokens = 1;
      one.rows = {row};
      EXPECT_TRUE(std::ranges::equal(run(one).output,
                                     std::span(all).subspan(row * hidden_size, hidden_size)));
    }
  }
}

TEST_F(NormCudaArgs, PartsOfARowShareItsGrid) {
  constexpr std::int64_t kTokens = 5;
  constexpr std::int64_t kCols = 768;
  Problem problem{.shape = {kTokens, kCols}, .dtype = DType::kFloat32, .kind = NormKind::kNone};
  problem.fill(2.0F);
  const OnDevice<float> input(Device::kCuda, problem.input);
  const OnDevice<float> codes(Device::kCuda, std::vector<float>(kTokens * kCols));
  const OnDevice<float> scales(Device::kCuda, std::vector<float>(kTokens));
  const OnDevice<float> extents(Device::kCuda, std::vector<float>(2 * kTokens));
  for (const InputMode mode : kDynamicModes) {
    problem.rounding = {.mode = mode};
    const Result whole = run(problem);
    const auto part = [&](std::int64_t first, std::int64_t cols) {
      return DeviceNormArgs{.input = input.data() + first,
                            .input_stride = kCols,
                            .rounding = problem.rounding,
                            .num_tokens = kTokens,
                            .hidden_size = cols,
                            .dtype = DType::kFloat32};
    };
    const std::int64_t size = is_symmetric(grid_mode(mode)) ? kTokens : 2 * kTokens;
    std::vector<float> largest(static_cast<std::size_t>(size));
    for (const auto& [first, cols] : {std::pair{0, 256}, {256, 512}}) {
      DeviceNormArgs args = part(first, cols);
      args.row_extents = extents.data();
      cuda::norm(args, nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      const std::vector<float> own = extents.read();
      for (std::int64_t i = 0; i < size; ++i) {
        largest[i] = std::max(largest[i], own[i]);
      }
    }
    const OnDevice<float> shared(Device::kCuda, largest);
    for (const auto& [first, cols] : {std::pair{0, 256}, {256, 512}}) {
      DeviceNormArgs args = part(first, cols);
      args.output = codes.data() + first;
      args.output_stride = kCols;
      args.row_scales = scales.data();
      args.given_extents = shared.data();
      cuda::norm(args, nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      EXPECT_EQ(scales.read(), whole.scales) << name_of(mode);
    }
    EXPECT_EQ(codes.read(), whole.output) << name_of(mode);
  }
}

TEST_F(NormCudaArgs, ExtentsAreThoseOfTheCpu) {
  constexpr std::int64_t kTokens = 5;
  for (const std::int64_t cols : {1, 7, 768}) {
    std::vector<float> values = normal_vector(kTokens * cols, 4);
    values[0] = kNan;
    values[static_cast<std::size_t>(cols)] = -kInfinity;
    std::fill_n(values.begin() + 2 * cols, cols, -0.0F);
    const OnDevice<float> input(Device::kCuda, values);
    for (const InputMode mode : kDynamicModes) {
      const std::size_t size = is_symmetric(grid_mode(mode)) ? kTokens : 2 * kTokens;
      const OnDevice<float> extents(Device::kCuda, std::vector<float>(size, -1.0F));
      cuda::norm({.input = input.data(),
                  .input_stride = cols,
                  .rounding = {.mode = mode},
                  .row_extents = extents.data(),
                  .num_tokens = kTokens,
                  .hidden_size = cols,
                  .dtype = DType::kFloat32},
                 nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      std::vector<float> expected(size);
      cpu::row_extents({.input = values.data(),
                        .extents = expected.data(),
                        .mode = grid_mode(mode),
                        .rows = kTokens,
                        .cols = cols,
                        .row_stride = cols});
      const auto bits = [](float number) { return std::bit_cast<std::uint32_t>(number); };
      EXPECT_TRUE(std::ranges::equal(extents.read(), expected, {}, bits, bits))
          << name_of(mode) << ", " << cols << " columns";
    }
  }
}

TEST_F(NormCudaArgs, RefusesExtentsBesideAnOutput) {
  float number = 0.0F;
  EXPECT_THROW(cuda::norm({.input = &number,
                           .output = &number,
                           .rounding = {.mode = InputMode::kDynamicInt8},
                           .row_extents = &number,
                           .num_tokens = 1,
                           .hidden_size = 1},
                          nullptr),
               Error);
}

TEST_F(NormCudaArgs, ManyRowsAreRight) {
  for (const auto& [num_tokens, hidden_size] :
       {std::pair{3001, 768}, {600, 5120}, {300, 12288}, {3000, 100}, {3000, 99}}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      Problem problem{.shape = {num_tokens, hidden_size}, .dtype = dtype};
      problem.fill();
      const std::vector<float> values = run(problem).output;
      expect_accurate(problem, values);
      for (const InputMode mode : kDynamicModes) {
        problem.rounding = {.mode = mode};
        expect_codes(run(problem), values, problem);
      }
      for (const InputRounding& rounding : static_roundings(0.02F)) {
        problem.rounding = rounding;
        expect_codes(run(problem), values, problem);
      }
    }
  }
}

TEST_F(NormCudaArgs, LayerNormWithoutBiasAddsNone) {
  Problem problem{.shape = {3, 768}, .with_bias = false};
  problem.fill();
  expect_accurate(problem, run(problem).output);
}

TEST_F(NormCudaArgs, AConstantRowIsTheBias) {
  Problem problem{.shape = {2, 640}, .dtype = DType::kFloat32};
  problem.fill();
  std::fill(problem.input.begin(), problem.input.end(), 3.0F);
  const std::vector<float> output = run(problem).output;
  EXPECT_TRUE(std::equal(problem.bias.begin(), problem.bias.end(), output.begin()));
}

TEST_F(NormCudaArgs, RowsOfZerosAndOfNansHaveTheCodesOfTheCpu) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const std::int64_t hidden_size : {5, 768}) {
      Problem problem{.shape = {5, hidden_size}, .dtype = dtype, .kind = NormKind::kNone};
      problem.fill();
      std::fill_n(problem.input.begin(), hidden_size, 0.0F);
      problem.input[hidden_size + 2] = kNan;
      problem.input[2 * hidden_size + 3] = kInfinity;
      problem.input[3 * hidden_size + 4] = -kNan;
      for (const InputMode mode : kDynamicModes) {
        problem.rounding = {.mode = mode};
        expect_codes(run(problem), problem.input, problem);
      }
    }
  }
}

TEST_F(NormCudaArgs, AGivenGridLimitsInfinitiesAndKeepsANan) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const std::int64_t hidden_size : {5, 768, 65536}) {
      Problem problem{.shape = {3, hidden_size}, .dtype = dtype, .kind = NormKind::kNone};
      problem.fill();
      std::fill_n(problem.input.begin(), hidden_size, -0.0F);
      problem.input[1] = kInfinity;
      problem.input[2] = -kInfinity;
      const std::vector<float> numbers = problem.input;
      for (const InputRounding& rounding : static_roundings(0.17F)) {
        problem.rounding = rounding;
        problem.input = numbers;
        expect_codes(run(problem), problem.input, problem);
        problem.input[3] = kNan;
        problem.input[4] = -kNan;
        Result result = run(problem);
        for (const int col : {3, 4}) {
          EXPECT_TRUE(std::isnan(result.output[col]));
          result.output[col] = problem.input[col] = 0.0F;
        }
        expect_codes(result, problem.input, problem);
      }
    }
  }
}

TEST_F(NormCudaArgs, ANanStaysInItsRow) {
  Problem problem{.shape = {3, 768}};
  problem.fill();
  problem.input[768 + 5] = kNan;
  const std::vector<float> output = run(problem).output;
  for (std::int64_t i = 0; i < std::ssize(output); ++i) {
    ASSERT_EQ(std::isnan(output[i]), i / 768 == 1) << i;
  }
}

TEST_F(NormCudaArgs, NothingToComputeIsNoError) {
  cuda::norm({.num_tokens = 0, .hidden_size = 8}, nullptr);
}

TEST_F(NormCudaArgs, BadArgumentsAreNamed) {
  const auto message = [](const DeviceNormArgs& args) {
    return error_of([&] { cuda::norm(args, nullptr); });
  };
  const Buffer memory(std::vector<float>(1024));
  const DeviceNormArgs args{.input = memory.data(),
                            .input_stride = 8,
                            .norm = {.kind = NormKind::kRmsNorm, .weight = memory.as<float>()},
                            .output = memory.as<char>() + 1024,
                            .output_stride = 8,
                            .num_tokens = 2,
                            .hidden_size = 8};
  EXPECT_EQ(message(args), "no error");
  DeviceNormArgs bad = args;
  bad.num_tokens = -1;
  EXPECT_EQ(message(bad), "norm: num_tokens must be in [0, 2147483647], got -1");
  bad = args;
  bad.hidden_size = 0;
  EXPECT_EQ(message(bad), "norm: hidden_size must be in [1, 1073741824], got 0");
  bad = args;
  bad.dtype = DType::kInt8;
  EXPECT_EQ(message(bad), "norm: dtype must be float16, bfloat16 or float32, got int8");
  bad = args;
  bad.norm.bias = memory.as<float>();
  EXPECT_EQ(message(bad), "norm: only LayerNorm has a bias");
  bad = args;
  bad.norm.weight = nullptr;
  EXPECT_EQ(message(bad), "norm: a norm's weight must not be null");
  bad = args;
  bad.output = nullptr;
  EXPECT_EQ(message(bad), "norm: input and output must not be null");
  bad = args;
  bad.input_stride = 7;
  EXPECT_EQ(message(bad), "norm: input_stride must be >= hidden_size, got 7 and 8");
  bad = args;
  bad.output_stride = 7;
  EXPECT_EQ(message(bad), "norm: output_stride must be >= hidden_size, got 7 and 8");
  bad = args;
  bad.output = memory.data();
  bad.output_stride = 9;
  EXPECT_EQ(message(bad),
            "norm: the output can be the input only with the same rows, stride and dtype");
  bad.output_stride = 8;
  bad.dtype = DType::kFloat16;
  EXPECT_EQ(message(bad), "no error");
  bad.float32_output = true;
  EXPECT_EQ(message(bad),
            "norm: the output can be the input only with the same rows, stride and dtype");
  bad = args;
  bad.rounding.mode = InputMode::kDynamicInt8;
  EXPECT_EQ(message(bad),
            "norm: row_scales must come with an INT8 rounding, and only then, got dynamic_int8 "
            "without");
  bad.row_scales = memory.as<float>() + 512;
  EXPECT_EQ(message(bad), "no error");
  bad.float32_output = true;
  EXPECT_EQ(message(bad), "norm: float32_output must be without a rounding, got dynamic_int8");
  bad.float32_output = false;
  bad.rounding = {.mode = InputMode::kStaticInt8, .scale = 0.1F};
  bad.given_extents = memory.as<float>();
  EXPECT_EQ(message(bad),
            "norm: given_extents need row_scales and a dynamic INT8 rounding, got static_int8 with "
            "row_scales");
  bad.given_extents = nullptr;
  for (const float scale : {-1.0F, 1e-39F, kInfinity, kNan}) {
    bad.rounding.scale = scale;
    EXPECT_EQ(message(bad).find("norm: input_scale must be finite and >= 1.17549e-38, got "), 0);
  }
  bad.rounding = {.mode = InputMode::kStaticAsymmetricInt8, .scale = 0.1F, .zero_point = 128};
  EXPECT_EQ(message(bad), "norm: input_zero_point must lie in [-128, 127], got 128");
  bad = args;
  bad.row_scales = memory.as<float>() + 512;
  EXPECT_EQ(message(bad),
            "norm: row_scales must come with an INT8 rounding, and only then, got float32 with "
            "row_scales");
  bad = args;
  bad.output = nullptr;
  bad.row_extents = memory.as<float>();
  EXPECT_EQ(message(bad), "norm: row_extents need a dynamic INT8 rounding, got float32");
}

}  // namespace
}  // namespace moq::kernels::testing
