// What linear does with its other arguments, and what it refuses.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/linear.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/linear_problem.h"

namespace moq::kernels {
namespace {

using test::error_of;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// -------------------------------------------------------------------------------------- epilogue

float activate(Activation activation, float x) {
  float y = 0.0F;
  cpu::activation({.input = &x, .output = &y, .size = 1, .activation = activation});
  return y;
}

class Epilogue : public testing::TestWithParam<Activation> {};

TEST_P(Epilogue, AppliesTheActivationAndThenAddsTheResidual) {
  const LinearProblem problem = LinearProblem::random(14, 70, 50);
  const std::vector<float> plain = problem.run();
  std::vector<float> residual(14 * 80);
  for (std::size_t i = 0; i < residual.size(); ++i) {
    residual[i] = static_cast<float>(i) * 0.25F;
  }
  std::vector<float> output(14 * 70);
  LinearArgs args = problem.args(output.data());
  args.activation = GetParam();
  args.residual = residual.data();
  args.residual_stride = 80;
  const ThreadScope scope(2);
  cpu::linear(args);
  for (std::int64_t i = 0; i < 14 * 70; ++i) {
    EXPECT_EQ(output[i], activate(GetParam(), plain[i]) + residual[i / 70 * 80 + i % 70]);
  }
}

INSTANTIATE_TEST_SUITE_P(Activations, Epilogue,
                         testing::Values(Activation::kNone, Activation::kGelu,
                                         Activation::kGeluTanh, Activation::kRelu,
                                         Activation::kSilu));

TEST(Linear, AddsToAnOutputThatIsItsOwnResidual) {
  const LinearProblem problem = LinearProblem::random(5, 70, 50);
  const std::vector<float> plain = problem.run();
  std::vector<float> output(5 * 70, 2.0F);
  LinearArgs args = problem.args(output.data());
  args.residual = output.data();
  args.residual_stride = 70;
  cpu::linear(args);
  for (std::int64_t i = 0; i < 5 * 70; ++i) {
    EXPECT_EQ(output[i], plain[i] + 2.0F);
  }
}

TEST(Linear, ReadsAndWritesStridedRowsAndNothingBetween) {
  const LinearProblem problem = LinearProblem::random(13, 37, 50);
  std::vector<float> input(13 * 60, kNan);
  for (std::int64_t i = 0; i < 13 * 50; ++i) {
    input[i / 50 * 60 + i % 50] = problem.input[i];
  }
  std::vector<float> output(13 * 40, -1.0F);
  LinearArgs args = problem.args(output.data());
  args.input = input.data();
  args.input_stride = 60;
  args.output_stride = 40;
  cpu::linear(args);
  const std::vector<float> expected = problem.run();
  for (std::int64_t i = 0; i < 13 * 40; ++i) {
    EXPECT_EQ(output[i], i % 40 < 37 ? expected[i / 40 * 37 + i % 40] : -1.0F);
  }
}

TEST(Linear, LeavesOutAMissingBias) {
  LinearProblem problem = LinearProblem::random(2, 37, 50);
  std::fill(problem.bias.begin(), problem.bias.end(), 0.0F);
  std::vector<float> output(2 * 37);
  LinearArgs args = problem.args(output.data());
  args.bias = nullptr;
  cpu::linear(args);
  EXPECT_EQ(output, problem.run());
}

// ----------------------------------------------------------------------------------------- errors

TEST(PackLinear, RefusesAGroupSizeThatDoesNotDivideTheColumns) {
  EXPECT_THROW(cpu::packed_linear_size({.n = 4, .k = 10, .group_size = 3}), Error);
  EXPECT_THROW(cpu::packed_linear_size({.n = 4, .k = 10, .group_size = 0}), Error);
}

TEST(PackLinear, RefusesNegativeSizes) {
  EXPECT_THROW(cpu::packed_linear_size({.n = -1, .k = 10, .group_size = 10}), Error);
}

TEST(PackLinear, RefusesZeroPointsOfFloatWeights) {
  EXPECT_THROW(cpu::packed_linear_size(
                   {.n = 1, .k = 1, .format = WeightFormat::kFloat32, .asymmetric = true}),
               Error);
}

TEST(PackLinear, RefusesACodeOutsideTheFormat) {
  LinearProblem problem = LinearProblem::random(1, 4, 8, WeightFormat::kInt4);
  problem.codes[20] = 8;
  EXPECT_THROW(problem.pack(), Error);
}

TEST(PackLinear, RefusesAZeroPointOutsideTheFormat) {
  LinearProblem problem = LinearProblem::random(1, 4, 8, WeightFormat::kInt4, 8, true);
  problem.zero_points[2] = -9;
  EXPECT_THROW(problem.pack(), Error);
}

TEST(PackLinear, RefusesAScaleThatIsNotFinite) {
  LinearProblem problem = LinearProblem::random(1, 4, 8);
  problem.scales[1] = kNan;
  EXPECT_THROW(problem.pack(), Error);
}

TEST(PackLinear, RefusesMisalignedMemory) {
  const LinearProblem problem = LinearProblem::random(1, 4, 8);
  PackLinearArgs args = problem.pack_args(problem.codes.data());
  args.packed = static_cast<std::byte*>(args.packed) + 4;
  EXPECT_THROW(cpu::pack_linear(args), Error);
}

TEST(PackLinear, RefusesNullPointers) {
  const LinearProblem problem = LinearProblem::random(1, 4, 8);
  EXPECT_THROW(cpu::pack_linear(problem.pack_args(nullptr)), Error);
  PackLinearArgs args = problem.pack_args(problem.codes.data());
  args.scales = nullptr;
  EXPECT_THROW(cpu::pack_linear(args), Error);
}

class RefusedArgs : public testing::Test {
 protected:
  LinearProblem problem_ = LinearProblem::random(2, 4, 8);
  std::vector<float> output_ = std::vector<float>(8);
  LinearArgs args_ = problem_.args(output_.data());
};

TEST_F(RefusedArgs, NegativeNumberOfRows) {
  args_.m = -1;
  EXPECT_THROW(cpu::linear(args_), Error);
}

TEST_F(RefusedArgs, RowsThatOverlap) {
  args_.input_stride = 7;
  EXPECT_THROW(cpu::linear(args_), Error);
  args_.input_stride = 8;
  args_.output_stride = 3;
  EXPECT_THROW(cpu::linear(args_), Error);
}

TEST_F(RefusedArgs, NullPointers) {
  LinearArgs args = args_;
  args.input = nullptr;
  EXPECT_THROW(cpu::linear(args), Error);
  args = args_;
  args.output = nullptr;
  EXPECT_THROW(cpu::linear(args), Error);
  args = args_;
  args.weight.data = nullptr;
  EXPECT_THROW(cpu::linear(args), Error);
}

TEST_F(RefusedArgs, MisalignedWeight) {
  args_.weight.data = static_cast<const std::byte*>(args_.weight.data) + 32;
  EXPECT_THROW(cpu::linear(args_), Error);
}

TEST_F(RefusedArgs, StaticInputWithoutAScale) {
  for (const InputMode mode : {InputMode::kStaticInt8, InputMode::kStaticAsymmetricInt8}) {
    args_.input_rounding = {.mode = mode};
    EXPECT_EQ(error_of([&] { cpu::linear(args_); }),
              "linear: input_scale must be finite and >= 1.17549e-38, got 0");
  }
}

TEST_F(RefusedArgs, ScaleAndZeroPointOfAnotherMode) {
  args_.input_rounding = {.mode = InputMode::kDynamicInt8, .scale = 0.5F};
  EXPECT_EQ(error_of([&] { cpu::linear(args_); }),
            "linear: input_scale must come with a static INT8 mode, got 0.5 and dynamic_int8");
  args_.input_rounding = {.mode = InputMode::kStaticInt8, .scale = 0.5F, .zero_point = 3};
  EXPECT_EQ(
      error_of([&] { cpu::linear(args_); }),
      "linear: input_zero_point must come with static_asymmetric_int8, got 3 and static_int8");
  for (const std::int32_t zero_point : {-129, 128}) {
    args_.input_rounding = {
        .mode = InputMode::kStaticAsymmetricInt8, .scale = 0.5F, .zero_point = zero_point};
    EXPECT_EQ(
        error_of([&] { cpu::linear(args_); }),
        "linear: input_zero_point must lie in [-128, 127], got " + std::to_string(zero_point));
  }
}

TEST_F(RefusedArgs, ExtentsOfAnotherMode) {
  const float extents[4] = {};
  args_.input_extents = extents;
  args_.input_rounding = {.mode = InputMode::kStaticInt8, .scale = 0.5F};
  EXPECT_EQ(error_of([&] { cpu::linear(args_); }),
            "linear: input_extents need a dynamic INT8 input mode, got static_int8");
}

TEST_F(RefusedArgs, Int8InputOfAFloatWeight) {
  const LinearProblem problem = LinearProblem::random(2, 4, 8, WeightFormat::kFloat32);
  EXPECT_THROW(cpu::linear(problem.args(output_.data(), InputMode::kDynamicInt8)), Error);
}

TEST_F(RefusedArgs, ActivationOverAResidualThatIsTheOutput) {
  args_.activation = Activation::kRelu;
  args_.residual = output_.data();
  args_.residual_stride = 4;
  EXPECT_THROW(cpu::linear(args_), Error);
}

}  // namespace
}  // namespace moq::kernels
