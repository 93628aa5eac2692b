#include "kernels/norm.h"

#include <tuple>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels {
namespace {

using test::expect_accurate;
using test::normal_vector;

constexpr float kEpsilon = 1e-5F;

/// Both norms by their definition; bias null and `centred` false is rms_norm.
template <typename Number>
std::vector<Number> reference(const std::vector<float>& x, const std::vector<float>& weight,
                              const std::vector<float>* bias, bool centred) {
  const std::size_t n = weight.size();
  std::vector<Number> output(x.size());
  for (std::size_t row = 0; row < x.size(); row += n) {
    Number mean = 0;
    for (std::size_t j = 0; centred && j < n; ++j) {
      mean += x[row + j];
    }
    mean /= static_cast<Number>(n);
    Number variance = 0;
    for (std::size_t j = 0; j < n; ++j) {
      variance += (x[row + j] - mean) * (x[row + j] - mean);
    }
    variance /= static_cast<Number>(n);
    const Number deviation = std::sqrt(variance + static_cast<Number>(kEpsilon));
    for (std::size_t j = 0; j < n; ++j) {
      output[row + j] = (x[row + j] - mean) / deviation * weight[j];
      output[row + j] += bias != nullptr ? (*bias)[j] : 0.0F;
    }
  }
  return output;
}

std::vector<float> added(std::vector<float> x, const std::vector<float>& y) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] += y[i];
  }
  return x;
}

struct Case {
  std::int64_t num_tokens;
  std::int64_t hidden_size;
};

class NormShape : public ::testing::TestWithParam<Case> {
 protected:
  std::int64_t num_tokens = GetParam().num_tokens;
  std::int64_t hidden_size = GetParam().hidden_size;
  // A mean far from zero: the variance must not be computed as a difference of squares.
  std::vector<float> input = added(normal_vector(num_tokens * hidden_size, 1),
                                   std::vector<float>(num_tokens* hidden_size, 30.0F));
  std::vector<float> residual = normal_vector(num_tokens * hidden_size, 2, 3.0F);
  std::vector<float> weight = normal_vector(hidden_size, 3);
  std::vector<float> bias = normal_vector(hidden_size, 4);
  std::vector<float> output = std::vector<float>(input.size());
  std::vector<float> sum = std::vector<float>(input.size());

  LayerNormArgs layer_norm_args() {
    return {.input = input.data(),
            .weight = weight.data(),
            .bias = bias.data(),
            .output = output.data(),
            .num_tokens = num_tokens,
            .hidden_size = hidden_size,
            .epsilon = kEpsilon};
  }
  RmsNormArgs rms_norm_args() {
    return {.input = input.data(),
            .weight = weight.data(),
            .output = output.data(),
            .num_tokens = num_tokens,
            .hidden_size = hidden_size,
            .epsilon = kEpsilon};
  }
};

TEST_P(NormShape, LayerNormAgreesWithFloat64) {
  cpu::layer_norm(layer_norm_args());
  expect_accurate(output, reference<float>(input, weight, &bias, true),
                  reference<double>(input, weight, &bias, true));
}

TEST_P(NormShape, LayerNormWithoutBiasAddsNone) {
  LayerNormArgs args = layer_norm_args();
  args.bias = nullptr;
  cpu::layer_norm(args);
  expect_accurate(output, reference<float>(input, weight, nullptr, true),
                  reference<double>(input, weight, nullptr, true));
}

TEST_P(NormShape, RmsNormAgreesWithFloat64) {
  cpu::rms_norm(rms_norm_args());
  expect_accurate(output, reference<float>(input, weight, nullptr, false),
                  reference<double>(input, weight, nullptr, false));
}

TEST_P(NormShape, LayerNormOfASumIsTheNormOfTheAddedRows) {
  LayerNormArgs args = layer_norm_args();
  args.residual = residual.data();
  args.sum = sum.data();
  cpu::layer_norm(args);
  const std::vector<float> fused = output;
  EXPECT_EQ(sum, added(input, residual));
  args.input = sum.data();
  args.residual = nullptr;
  args.sum = nullptr;
  cpu::layer_norm(args);
  EXPECT_EQ(fused, output);
}

TEST_P(NormShape, RmsNormUpdatesTheResidualStreamInPlace) {
  RmsNormArgs args = rms_norm_args();
  const std::vector<float> expected_sum = added(input, residual);
  args.residual = residual.data();
  args.sum = residual.data();
  cpu::rms_norm(args);
  EXPECT_EQ(residual, expected_sum);
  expect_accurate(output, reference<float>(expected_sum, weight, nullptr, false),
                  reference<double>(expected_sum, weight, nullptr, false));
}

TEST_P(NormShape, ResidualWithoutASumIsAddedOnTheWay) {
  LayerNormArgs args = layer_norm_args();
  args.residual = residual.data();
  args.sum = sum.data();
  cpu::layer_norm(args);
  const std::vector<float> expected = output;
  args.sum = nullptr;
  args.output = input.data();  // in place
  cpu::layer_norm(args);
  EXPECT_EQ(input, expected);
}

TEST_P(NormShape, RowsDoNotDependOnTheirNeighboursOrThreads) {
  cpu::layer_norm(layer_norm_args());
  const std::vector<float> together = output;
  std::fill(output.begin(), output.end(), 0.0F);
  {
    const ThreadScope threads(3);
    cpu::layer_norm(layer_norm_args());
    EXPECT_EQ(output, together);
  }
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    LayerNormArgs args = layer_norm_args();
    args.input += t * hidden_size;
    args.num_tokens = 1;
    cpu::layer_norm(args);
    ASSERT_TRUE(std::equal(output.begin(), output.begin() + hidden_size,
                           together.begin() + t * hidden_size));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, NormShape,
                         ::testing::Values(Case{1, 1}, Case{3, 7}, Case{2, 31}, Case{5, 97},
                                           Case{4, 576}, Case{17, 768}),
                         [](const auto& info) {
                           return std::to_string(info.param.num_tokens) + "x" +
                                  std::to_string(info.param.hidden_size);
                         });

TEST(NormTest, ConstantRowIsTheBias) {
  const std::vector<float> input(19, 3.0F);
  const std::vector<float> weight(19, 2.0F);
  const std::vector<float> bias = normal_vector(19, 5);
  std::vector<float> output(19);
  cpu::layer_norm({.input = input.data(),
                   .weight = weight.data(),
                   .bias = bias.data(),
                   .output = output.data(),
                   .num_tokens = 1,
                   .hidden_size = 19,
                   .epsilon = kEpsilon});
  EXPECT_EQ(output, bias);
}

TEST(NormTest, RefusesSizesOutOfRangeAndASumInTheOutput) {
  std::vector<float> row(4, 1.0F);
  LayerNormArgs layer{.input = row.data(),
                      .weight = row.data(),
                      .output = row.data(),
                      .num_tokens = 1,
                      .hidden_size = 0,
                      .epsilon = kEpsilon};
  EXPECT_THROW(cpu::layer_norm(layer), Error);
  RmsNormArgs rms{.input = row.data(),
                  .weight = row.data(),
                  .output = row.data(),
                  .num_tokens = -1,
                  .hidden_size = 4,
                  .epsilon = kEpsilon};
  EXPECT_THROW(cpu::rms_norm(rms), Error);
  rms.num_tokens = 1;
  rms.sum = row.data();
  EXPECT_THROW(cpu::rms_norm(rms), Error);
}

}  // namespace
}  // namespace moq::kernels
