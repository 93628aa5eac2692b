// The CUDA bodies of linear against the definition in float64: shapes, formats, dtypes,
// activations, bad arguments.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/linear.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/linear_cuda_problem.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// ----------------------------------------------------------------------------------- every shape

struct Shape {
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  std::int64_t group_size = 0;
};

class LinearCuda : public ::testing::TestWithParam<std::tuple<Shape, WeightFormat, DType, bool>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  LinearProblem problem() const {
    const auto& [shape, format, dtype, asymmetric] = GetParam();
    return LinearProblem::random(shape.m, shape.n, shape.k, format, shape.group_size, asymmetric);
  }
  DType dtype() const { return std::get<DType>(GetParam()); }
};

TEST_P(LinearCuda, IsTheDefinition) {
  expect_close(multiply(problem(), {.dtype = dtype()}));
}

TEST_P(LinearCuda, ReadsAndWritesPaddedRowsFromAnyAddress) {
  expect_close(
      multiply(problem(), {.dtype = dtype(), .residual = true, .padding = 5, .offset = 3}));
}

TEST_P(LinearCuda, GivesTheSameBitsWhenTheWeightIsReadEarly) {
  EXPECT_EQ(multiply(problem(), {.dtype = dtype()}).output,
            multiply(problem(), {.dtype = dtype(), .weight_is_ready = true}).output);
}

const auto kShapes = ::testing::Values(
    Shape{1, 1, 1}, Shape{1, 16, 32}, Shape{2, 17, 33}, Shape{3, 15, 31}, Shape{8, 97, 257},
    Shape{1, 1600, 1600}, Shape{7, 100, 64, 32}, Shape{5, 48, 105, 35}, Shape{4, 40, 384, 128},
    Shape{9, 33, 96}, Shape{13, 64, 101}, Shape{65, 70, 130}, Shape{8, 40, 6144},
    Shape{8, 24, 6145}, Shape{11, 24, 6400}, Shape{2, 50, 96, 16}, Shape{9, 128, 8},
    Shape{16, 200, 264}, Shape{17, 129, 384, 128}, Shape{32, 64, 2048}, Shape{33, 130, 320, 64},
    Shape{64, 257, 1024}, Shape{65, 300, 520}, Shape{129, 140, 1600}, Shape{257, 20, 640, 32},
    Shape{12, 1600, 96});
const auto kDTypes = ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32);

INSTANTIATE_TEST_SUITE_P(Integers, LinearCuda,
                         ::testing::Combine(kShapes,
                                            ::testing::Values(WeightFormat::kInt8,
                                                              WeightFormat::kInt4,
                                                              WeightFormat::kInt2),
                                            kDTypes, ::testing::Bool()));
INSTANTIATE_TEST_SUITE_P(Floats, LinearCuda,
                         ::testing::Combine(kShapes,
                                            ::testing::Values(WeightFormat::kFloat32,
                                                              WeightFormat::kFloat16,
                                                              WeightFormat::kBFloat16),
                                            kDTypes, ::testing::Values(false)));

// ------------------------------------------------------------------------------------- epilogues

class LinearCudaEpilogue : public ::testing::TestWithParam<std::tuple<Activation, DType, bool>> {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearCudaEpilogue, AppliesTheActivationAndThenTheResidual) {
  const auto& [activation, dtype, extras] = GetParam();
  for (const std::int64_t m : {std::int64_t{3}, std::int64_t{11}}) {
    LinearProblem problem = LinearProblem::random(m, 37, 64);
    for (float& scale : problem.scales) {
      scale *= 0.05F;  // results where activations bend
    }
    expect_close(multiply(
        problem, {.dtype = dtype, .activation = activation, .bias = extras, .residual = extras}));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Every, LinearCudaEpilogue,
    ::testing::Combine(::testing::Values(Activation::kNone, Activation::kRelu, Activation::kGelu,
                                         Activation::kGeluTanh, Activation::kQuickGelu,
                                         Activation::kSilu, Activation::kTanh),
                       ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32),
                       ::testing::Bool()));

// ----------------------------------------------------------------------------------------- rest

class LinearCudaArgs : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(LinearCudaArgs, ATokenGivesTheSameBitsAmongUpToEight) {
  // With 7536 columns of 16 bits the pieces of one token have odd lengths, those of eight even
  // ones.
  for (const auto& [k, format] : {std::pair{std::int64_t{320}, WeightFormat::kInt8},
                                  {4256, WeightFormat::kInt8},
                                  {4256, WeightFormat::kFloat16},
                                  {7536, WeightFormat::kFloat16}}) {
    const LinearProblem many = LinearProblem::random(8, 75, k, format, k);
    LinearProblem one = many;
    one.m = 1;
    const std::vector<float> all = multiply(many, {}).output;
    for (std::int64_t i = 0; i < many.m; ++i) {
      one.input.assign(many.input.begin() + i * k, many.input.begin() + (i + 1) * k);
      EXPECT_EQ(multiply(one, {}).output,
                std::vector<float>(all.begin() + i * 75, all.begin() + (i + 1) * 75));
    }
  }
}

TEST_F(LinearCudaArgs, ATokenGivesTheSameBitsInEveryPlace) {
  for (const std::int64_t m : {std::int64_t{16}, std::int64_t{130}}) {
    LinearProblem problem = LinearProblem::random(m, 75, 320);
    for (std::int64_t i = 1; i < m; ++i) {
      std::copy_n(problem.input.begin(), 320, problem.input.begin() + i * 320);
    }
    const std::vector<float> output = multiply(problem, {}).output;
    for (std::int64_t i = 1; i < m; ++i) {
      ASSERT_TRUE(std::equal(output.begin(), output.begin() + 75, output.begin() + i * 75)) << i;
    }
  }
}

TEST_F(LinearCudaArgs, RoomBesideTheBlocksChangesNoBits) {
  for (const std::int64_t m : {1, 3}) {
    const LinearProblem problem = LinearProblem::random(m, 2128, 7536, WeightFormat::kFloat16);
    const std::vector<float> alone = multiply(problem, {.weight_is_ready = true}).output;
    for (const bool spread : {false, true}) {
      EXPECT_EQ(
          multiply(problem, {.weight_is_ready = true, .spread = spread, .in_chain = true}).output,
          alone);
    }
  }
}

TEST_F(LinearCudaArgs, EveryBlockOfManyRowsIsRight) {
  for (const auto& [m, n, k] : {std::tuple{1, 25700, 64},
                                {1, 50257, 64},
                                {9, 50257, 64},
                                {1, 2128, 7536},
                                {3, 10570, 864},
                                {9, 5300, 1700},
                                {1, 75, 70000},
                                {3, 600, 17000},
                                {7, 600, 17000},
                                {16, 600, 17000},
                                {16, 4096, 320}}) {
    expect_close(multiply(LinearProblem::random(m, n, k, WeightFormat::kInt8, k), {}));
    expect_close(multiply(LinearProblem::random(m, n, k, WeightFormat::kFloat16), {}));
  }
}

TEST_F(LinearCudaArgs, ANanStaysInItsToken) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const Activation activation : {Activation::kNone, Activation::kRelu, Activation::kGelu}) {
      LinearProblem problem = LinearProblem::random(3, 20, 64);
      problem.input[64 + 5] = kNan;
      const std::vector<float> output =
          multiply(problem, {.dtype = dtype, .activation = activation}).output;
      for (std::size_t i = 0; i < output.size(); ++i) {
        EXPECT_EQ(std::isnan(output[i]), i / 20 == 1) << i;
      }
    }
  }
}

TEST_F(LinearCudaArgs, NothingToComputeWritesNothing) {
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{0, 5}, {3, 0}}) {
    cuda::linear({.m = m, .weight = {.shape = {.n = n, .k = 4, .group_size = 4}}}, nullptr);
  }
  expect_close(multiply(LinearProblem::random(2, 5, 0, WeightFormat::kFloat16), {}));
}

TEST_F(LinearCudaArgs, BadArgumentsAreNamed) {
  const LinearShape shape{.n = 4, .k = 8, .group_size = 8};
  const auto message = [](const DeviceLinearArgs& args) {
    return error_of([&] { cuda::linear(args, nullptr); });
  };
  const Buffer memory(4096);
  DeviceLinearArgs args{.input = memory.data(),
                        .m = 2,
                        .input_stride = 8,
                        .weight = {.shape = shape, .data = memory.data()},
                        .output = memory.data(),
                        .output_stride = 4};
  DeviceLinearArgs bad = args;
  bad.m = -1;
  EXPECT_EQ(message(bad), "linear: m must be >= 0, got -1");
  bad = args;
  bad.input_stride = 7;
  EXPECT_EQ(message(bad), "linear: input_stride must be >= k, got 7 and 8");
  bad = args;
  bad.output = nullptr;
  EXPECT_EQ(message(bad), "linear: output must not be null");
  bad = args;
  bad.dtype = DType::kInt8;
  EXPECT_EQ(message(bad), "linear: dtype must be float16, bfloat16 or float32, got int8");
  bad = args;
  bad.weight.data = memory.as<char>() + 16;
  EXPECT_NE(message(bad).find("must be aligned to 128 bytes"), std::string::npos);
}

}  // namespace
}  // namespace moq::kernels::testing
