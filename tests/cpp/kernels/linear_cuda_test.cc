// The CUDA bodies of linear against the definition in float64, within the bound of their
// arithmetic: exact products, float32 sums, one rounding of the result.
#include <gtest/gtest.h>

#include "kernels/linear.h"
#include "tests/cpp/kernels/device.h"

#if defined(MOQ_WITH_CUDA)

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/visit.h"
#include "tests/cpp/kernels/linear_problem.h"

namespace moq::kernels::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Numbers as the bits of a dtype, and back.
std::vector<std::byte> to_bytes(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  visit_float(dtype, [&]<typename Element>(Element) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      store_float(reinterpret_cast<Element*>(bytes.data()) + i, values[i]);
    }
  });
  return bytes;
}

std::vector<float> from_bytes(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  visit_float(dtype, [&]<typename Element>(Element) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = to_float(reinterpret_cast<const Element*>(bytes.data())[i]);
    }
  });
  return values;
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kTanh:
      return std::tanh(x);
    default:
      return x;
  }
}

/// How a problem is multiplied.
struct Call {
  DType dtype = DType::kFloat16;
  Activation activation = Activation::kNone;
  bool bias = true;
  bool residual = false;
  std::int64_t padding = 0;  ///< elements between rows of input, residual and output
  std::int64_t offset = 0;   ///< elements before the input's first row
  bool weight_is_ready = false;
};

struct Outcome {
  std::vector<float> output;    ///< [m, n]
  std::vector<double> exact;    ///< the definition
  std::vector<double> allowed;  ///< the largest error of float32 sums and one rounding
};

/// Rows of a matrix with `padding` elements, all -7, behind each, and `offset` before the first.
std::vector<float> spread(const std::vector<float>& values, std::int64_t rows, std::int64_t cols,
                          std::int64_t padding, std::int64_t offset) {
  std::vector<float> wide(static_cast<std::size_t>(offset + rows * (cols + padding)), -7.0F);
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    wide[static_cast<std::size_t>(offset + i / cols * (cols + padding) + i % cols)] =
        values[static_cast<std::size_t>(i)];
  }
  return wide;
}

Outcome multiply(const LinearProblem& problem, const Call& call) {
  const auto [n, k] = std::pair(problem.shape.n, problem.shape.k);
  const std::int64_t m = problem.m;
  const OnDevice<std::byte> weight(Device::kCuda, problem.weight_data());
  const OnDevice<float> scales(Device::kCuda, problem.scales);
  const OnDevice<std::int32_t> zero_points(Device::kCuda, problem.zero_points);
  const OnDevice<std::byte> packed(Device::kCuda,
                                   std::vector<std::byte>(cuda::packed_linear_size(problem.shape)));
  PackLinearArgs pack = problem.pack_args(weight.data());
  pack.scales = scales.data();
  pack.zero_points = problem.shape.asymmetric ? zero_points.data() : nullptr;
  pack.packed = packed.data();
  cuda::pack_linear(pack, nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());

  std::vector<float> residual(static_cast<std::size_t>(m * n));
  for (std::size_t i = 0; i < residual.size(); ++i) {
    residual[i] = 0.25F * static_cast<float>(i % 13) - 1.0F;
  }
  const auto rounded = [&](std::vector<float> values) {
    return from_bytes(to_bytes(values, call.dtype), call.dtype);
  };
  const std::vector<float> input = rounded(problem.input);
  const std::vector<float> bias = rounded(problem.bias);
  const OnDevice<std::byte> device_input(
      Device::kCuda, to_bytes(spread(input, m, k, call.padding, call.offset), call.dtype));
  const OnDevice<std::byte> device_bias(Device::kCuda, to_bytes(bias, call.dtype));
  const OnDevice<std::byte> device_residual(
      Device::kCuda, to_bytes(spread(residual, m, n, call.padding, 0), call.dtype));
  const OnDevice<std::byte> output(
      Device::kCuda,
      to_bytes(spread(std::vector<float>(residual.size(), kNan), m, n, call.padding, 0),
               call.dtype));
  cuda::linear({.input = device_input.data() + call.offset * size_of(call.dtype),
                .m = m,
                .input_stride = k + call.padding,
                .weight = {.shape = problem.shape, .data = packed.data()},
                .bias = call.bias ? device_bias.data() : nullptr,
                .activation = call.activation,
                .residual = call.residual ? device_residual.data() : nullptr,
                .residual_stride = n + call.padding,
                .output = output.data(),
                .output_stride = n + call.padding,
                .dtype = call.dtype,
                .weight_is_ready = call.weight_is_ready},
               nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());

  const std::vector<float> wide = from_bytes(output.read(), call.dtype);
  const double ulp = call.dtype == DType::kFloat32   ? 0x1p-24
                     : call.dtype == DType::kFloat16 ? 0x1p-11
                                                     : 0x1p-8;
  Outcome outcome;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n + call.padding; ++j) {
      const float value = wide[static_cast<std::size_t>(i * (n + call.padding) + j)];
      if (j >= n) {
        EXPECT_EQ(value, -7.0F) << "behind row " << i;
        continue;
      }
      double exact = 0.0;
      double magnitude = 0.0;
      for (std::int64_t c = 0; c < k; ++c) {
        const double product = input[static_cast<std::size_t>(i * k + c)] * problem.weight_at(j, c);
        exact += product;
        magnitude += std::fabs(product);
      }
      exact += call.bias ? bias[static_cast<std::size_t>(j)] : 0.0;
      exact = activate(call.activation, exact);
      exact += call.residual ? residual[static_cast<std::size_t>(i * n + j)] : 0.0;
      outcome.output.push_back(value);
      outcome.exact.push_back(exact);
      // Tensor cores cut a sum's last bits off instead of rounding them: a few float32 ulps for
      // each of the k / 16 additions of a warp, far below this.
      outcome.allowed.push_back((magnitude * 0x1p-18 + std::fabs(exact) * ulp) * 1.01 + 1e-6);
    }
  }
  return outcome;
}

void expect_close(const Outcome& outcome) {
  for (std::size_t i = 0; i < outcome.output.size(); ++i) {
    ASSERT_LE(std::fabs(outcome.output[i] - outcome.exact[i]), outcome.allowed[i])
        << "element " << i << ": " << outcome.output[i] << ", expected " << outcome.exact[i];
  }
}

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
  for (const std::int64_t k : {320, 4256}) {
    const LinearProblem many = LinearProblem::random(8, 75, k);
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

TEST_F(LinearCudaArgs, EveryBlockOfManyRowsIsRight) {
  for (const auto& [m, n, k] :
       {std::tuple{1, 25700, 64}, {3, 10570, 864}, {9, 5300, 1700}, {16, 600, 17000}}) {
    expect_close(multiply(LinearProblem::random(m, n, k, WeightFormat::kInt8, k), {}));
    expect_close(multiply(LinearProblem::random(m, n, k, WeightFormat::kFloat16), {}));
  }
}

TEST_F(LinearCudaArgs, ANanStaysInItsToken) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    LinearProblem problem = LinearProblem::random(3, 20, 64);
    problem.input[64 + 5] = kNan;
    const std::vector<float> output = multiply(problem, {.dtype = dtype}).output;
    for (std::size_t i = 0; i < output.size(); ++i) {
      EXPECT_EQ(std::isnan(output[i]), i / 20 == 1) << i;
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
    try {
      cuda::linear(args, nullptr);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
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

#endif
