// AdamW of many tensors against its formula in float64, on both devices.
#include "kernels/adamw.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/common/adamw_math.h"
#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/adamw.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/float_support.h"
#include "tests/cpp/kernels/isa_axis.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;
using test::normal_vector;

struct Types {
  DType parameter;
  DType gradient;
};

constexpr Types kTypes[] = {{DType::kFloat32, DType::kFloat32},
                            {DType::kFloat32, DType::kBFloat16},
                            {DType::kFloat32, DType::kFloat16},
                            {DType::kBFloat16, DType::kBFloat16},
                            {DType::kFloat16, DType::kFloat16}};

/// A tensor before a step, its numbers rounded to its dtypes; `offset` elements of each array's
/// memory come before it.
struct Tensor {
  Types types;
  std::vector<float> parameter;
  std::vector<float> gradient;
  std::vector<float> exp_avg;
  std::vector<float> exp_avg_sq;
  float step;
  std::int64_t offset = 0;

  std::int64_t size() const { return static_cast<std::int64_t>(parameter.size()); }
};

Tensor random_tensor(std::int64_t size, Types types, float step, unsigned seed,
                     std::int64_t offset = 0) {
  Tensor tensor{.types = types,
                .parameter = rounded(normal_vector(size, seed), types.parameter),
                .gradient = rounded(normal_vector(size, seed + 1), types.gradient),
                .exp_avg = rounded(normal_vector(size, seed + 2, 0.3F), types.parameter),
                .exp_avg_sq = normal_vector(size, seed + 3, 0.3F),
                .step = step,
                .offset = offset};
  for (float& square : tensor.exp_avg_sq) {
    square = std::fabs(square);
  }
  tensor.exp_avg_sq = rounded(tensor.exp_avg_sq, types.parameter);
  return tensor;
}

/// The arguments of a call but for its pointers.
struct Hyperparameters {
  double learning_rate = 0.01;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double weight_decay = 0.1;
  double epsilon = 1e-8;
  bool maximize = false;
};

/// Scalars in the device's memory; none: null.
struct Scalars {
  std::vector<float> learning_rate = {};
  std::vector<float> grad_scale = {};
  std::vector<float> found_inf = {};
};

/// One array of a tensor on a device.
class Array {
 public:
  Array(Device device, const std::vector<float>& values, DType dtype, std::int64_t offset)
      : dtype_(dtype),
        before_(static_cast<std::size_t>(offset) * size_of(dtype)),
        memory_(device, bytes_behind(before_, to_bytes(values, dtype))) {}

  void* data() const { return memory_.data() + before_; }

  std::vector<float> read() const {
    const std::vector<std::byte> bytes = memory_.read();
    return from_bytes({bytes.begin() + static_cast<std::ptrdiff_t>(before_), bytes.end()}, dtype_);
  }

 private:
  static std::vector<std::byte> bytes_behind(std::size_t before, std::vector<std::byte> bytes) {
    bytes.insert(bytes.begin(), before, std::byte{0});
    return bytes;
  }

  DType dtype_;
  std::size_t before_;
  OnDevice<std::byte> memory_;
};

std::vector<Tensor> run(Device device, const std::vector<Tensor>& tensors,
                        const Hyperparameters& hyper, const Scalars& scalars = {}) {
  std::vector<std::vector<std::unique_ptr<Array>>> arrays;
  std::vector<std::unique_ptr<OnDevice<float>>> steps;
  std::vector<AdamWTensor> described;
  for (const Tensor& tensor : tensors) {
    const auto& [parameter, gradient] = tensor.types;
    auto& own = arrays.emplace_back();
    own.push_back(std::make_unique<Array>(device, tensor.parameter, parameter, tensor.offset));
    own.push_back(std::make_unique<Array>(device, tensor.gradient, gradient, tensor.offset));
    own.push_back(std::make_unique<Array>(device, tensor.exp_avg, parameter, tensor.offset));
    own.push_back(std::make_unique<Array>(device, tensor.exp_avg_sq, parameter, tensor.offset));
    steps.push_back(std::make_unique<OnDevice<float>>(device, std::vector<float>{tensor.step}));
    described.push_back({.parameter = own[0]->data(),
                         .gradient = own[1]->data(),
                         .exp_avg = own[2]->data(),
                         .exp_avg_sq = own[3]->data(),
                         .step = steps.back()->data(),
                         .size = tensor.size(),
                         .parameter_dtype = parameter,
                         .gradient_dtype = gradient});
  }
  const OnDevice<float> learning_rate(device, scalars.learning_rate);
  const OnDevice<float> grad_scale(device, scalars.grad_scale);
  const OnDevice<float> found_inf(device, scalars.found_inf);
  const AdamWArgs args{
      .tensors = described,
      .learning_rate = hyper.learning_rate,
      .learning_rate_tensor = scalars.learning_rate.empty() ? nullptr : learning_rate.data(),
      .beta1 = hyper.beta1,
      .beta2 = hyper.beta2,
      .weight_decay = hyper.weight_decay,
      .epsilon = hyper.epsilon,
      .maximize = hyper.maximize,
      .grad_scale = scalars.grad_scale.empty() ? nullptr : grad_scale.data(),
      .found_inf = scalars.found_inf.empty() ? nullptr : found_inf.data()};
  if (device == Device::kCpu) {
    const ThreadScope threads(2);
    cpu::adamw(args);
  }
#if defined(MOQ_WITH_CUDA)
  if (device == Device::kCuda) {
    cuda::adamw(args, nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  }
#endif
  std::vector<Tensor> result = tensors;
  for (std::size_t i = 0; i < result.size(); ++i) {
    result[i].parameter = arrays[i][0]->read();
    EXPECT_EQ(to_bytes(arrays[i][1]->read(), tensors[i].types.gradient),
              to_bytes(tensors[i].gradient, tensors[i].types.gradient));
    result[i].exp_avg = arrays[i][2]->read();
    result[i].exp_avg_sq = arrays[i][3]->read();
    result[i].step = steps[i]->read()[0];
  }
  return result;
}

// -------------------------------------------------------------------------------- the definition

/// `value` is `exact` but for what float32 operations on numbers up to `magnitude`, and rounding to
/// a dtype, may do.
void expect_close(float value, double exact, double magnitude, DType dtype, const char* what,
                  std::size_t i) {
  constexpr double kOperations = 8.0;
  const RoundingError stored = rounding_error(dtype);
  const double bound = magnitude * kOperations * 0x1p-24 + 0x1p-140 +
                       std::fabs(exact) * stored.relative + stored.absolute;
  ASSERT_NEAR(value, exact, bound) << what << " " << i;
}

void expect_step(const Tensor& after, const Tensor& before, const Hyperparameters& hyper,
                 double grad_scale = 1.0) {
  const double t = static_cast<double>(before.step) + 1.0;
  ASSERT_EQ(after.step, before.step + 1.0F);
  ASSERT_EQ(after.size(), before.size());
  for (std::size_t i = 0; i < before.parameter.size(); ++i) {
    const double g = (hyper.maximize ? -1.0 : 1.0) * before.gradient[i] / grad_scale;
    const double m_kept = hyper.beta1 * before.exp_avg[i];
    const double m = m_kept + (1.0 - hyper.beta1) * g;
    const double v = hyper.beta2 * before.exp_avg_sq[i] + (1.0 - hyper.beta2) * g * g;
    const double p = before.parameter[i] * (1.0 - hyper.learning_rate * hyper.weight_decay);
    const double per_average = hyper.learning_rate / (1.0 - std::pow(hyper.beta1, t)) /
                               (std::sqrt(v / (1.0 - std::pow(hyper.beta2, t))) + hyper.epsilon);
    const double m_magnitude = std::fabs(m_kept) + std::fabs(m - m_kept);
    const DType dtype = before.types.parameter;
    expect_close(after.exp_avg[i], m, m_magnitude, dtype, "exp_avg", i);
    expect_close(after.exp_avg_sq[i], v, v, dtype, "exp_avg_sq", i);
    expect_close(after.parameter[i], p - per_average * m,
                 std::fabs(before.parameter[i]) + per_average * m_magnitude, dtype, "parameter", i);
  }
}

// ----------------------------------------------------------------------------------------- tests

class AdamWOn : public ::testing::TestWithParam<Device> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT(GetParam()); }
};

TEST_P(AdamWOn, EveryPairOfDtypesAtSizesThatFitNoVector) {
  std::vector<Tensor> tensors;
  unsigned seed = 0;
  for (const Types types : kTypes) {
    for (const std::int64_t size : {0, 1, 3, 8, 251, 4096, 4097, 40009}) {
      tensors.push_back(random_tensor(size, types, static_cast<float>(size % 7), seed));
      seed += 4;
    }
  }
  const std::vector<Tensor> after = run(GetParam(), tensors, {});
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    SCOPED_TRACE("tensor " + std::to_string(i));
    expect_step(after[i], tensors[i], {});
  }
}

TEST_P(AdamWOn, MemoryThatIsNotAlignedToVectors) {
  std::vector<Tensor> tensors;
  for (const Types types : kTypes) {
    for (const std::int64_t offset : {1, 2, 4, 5}) {
      tensors.push_back(random_tensor(1000, types, 3.0F, 50, offset));
    }
  }
  const std::vector<Tensor> after = run(GetParam(), tensors, {});
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    SCOPED_TRACE("tensor " + std::to_string(i));
    expect_step(after[i], tensors[i], {});
  }
}

TEST_P(AdamWOn, MoreTensorsThanALaunchCarries) {
  constexpr int kMany = 4100;
  std::vector<Tensor> tensors;
  tensors.reserve(kMany);
  for (int i = 0; i < kMany; ++i) {
    tensors.push_back(random_tensor(1 + i % 5, kTypes[i % 2], static_cast<float>(i % 11),
                                    static_cast<unsigned>(4 * i)));
  }
  const std::vector<Tensor> after = run(GetParam(), tensors, {});
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    SCOPED_TRACE("tensor " + std::to_string(i));
    expect_step(after[i], tensors[i], {});
  }
}

TEST_P(AdamWOn, BiasCorrectionsOfTheFirstAndOfLateSteps) {
  for (const float step : {0.0F, 1.0F, 9.0F, 1000.0F, 100'000.0F}) {
    for (const auto& [beta1, beta2] : {std::pair{0.9, 0.999}, {0.0, 0.0}, {0.95, 0.99999}}) {
      const Hyperparameters hyper{.beta1 = beta1, .beta2 = beta2};
      const Tensor tensor = random_tensor(100, kTypes[1], step, 7);
      expect_step(run(GetParam(), {tensor}, hyper)[0], tensor, hyper);
    }
  }
}

TEST_P(AdamWOn, MaximizesAndDividesByTheGradientScale) {
  const Hyperparameters hyper{.weight_decay = 0.0, .epsilon = 1e-3, .maximize = true};
  const Tensor tensor = random_tensor(333, kTypes[2], 4.0F, 9);
  const std::vector<Tensor> after =
      run(GetParam(), {tensor}, hyper, {.grad_scale = {24.0F}, .found_inf = {0.0F}});
  expect_step(after[0], tensor, hyper, 24.0);
}

TEST_P(AdamWOn, ALearningRateInMemoryTakesThePlaceOfTheOther) {
  const Tensor tensor = random_tensor(333, kTypes[0], 4.0F, 9);
  const std::vector<Tensor> after =
      run(GetParam(), {tensor}, {.learning_rate = 5.0}, {.learning_rate = {0.125F}});
  expect_step(after[0], tensor, {.learning_rate = 0.125});
}

TEST_P(AdamWOn, AnOverflowChangesNothing) {
  Tensor tensor = random_tensor(333, kTypes[1], 4.0F, 9);
  tensor.gradient[5] = std::numeric_limits<float>::infinity();
  const Tensor after = run(GetParam(), {tensor}, {}, {.found_inf = {1.0F}})[0];
  EXPECT_EQ(after.parameter, tensor.parameter);
  EXPECT_EQ(after.exp_avg, tensor.exp_avg);
  EXPECT_EQ(after.exp_avg_sq, tensor.exp_avg_sq);
  EXPECT_EQ(after.step, 4.0F);
}

TEST_P(AdamWOn, ANanStaysInItsElement) {
  Tensor tensor = random_tensor(20, kTypes[1], 0.0F, 9);
  tensor.gradient[5] = std::numeric_limits<float>::quiet_NaN();
  const Tensor after = run(GetParam(), {tensor}, {})[0];
  for (std::size_t i = 0; i < tensor.parameter.size(); ++i) {
    EXPECT_EQ(std::isnan(after.parameter[i]), i == 5);
    EXPECT_EQ(std::isnan(after.exp_avg[i]), i == 5);
    EXPECT_EQ(std::isnan(after.exp_avg_sq[i]), i == 5);
  }
}

TEST_P(AdamWOn, AnInfiniteParameterStaysWithoutADecay) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Types types : kTypes) {
    Tensor tensor = random_tensor(9, types, 0.0F, 7);
    tensor.parameter[2] = -infinity;
    tensor.parameter[8] = infinity;
    const Tensor updated = run(GetParam(), {tensor}, {.weight_decay = 0.0})[0];
    EXPECT_EQ(updated.parameter[2], -infinity);
    EXPECT_EQ(updated.parameter[8], infinity);
  }
}

TEST_P(AdamWOn, BadArgumentsAreNamed) {
  OnDevice<float> step(GetParam(), {0.0F});
  const auto message = [&](const auto& spoil) {
    AdamWTensor tensor{.step = step.data()};
    AdamWArgs args{.tensors = {&tensor, 1}};
    spoil(args, tensor);
    return error_of([&] {
#if defined(MOQ_WITH_CUDA)
      if (GetParam() == Device::kCuda) {
        cuda::adamw(args, nullptr);
        return;
      }
#endif
      cpu::adamw(args);
    });
  };
  const auto of_dtypes = [&](DType parameter, DType gradient) {
    return message([&](auto&, auto& tensor) {
      tensor.parameter_dtype = parameter;
      tensor.gradient_dtype = gradient;
    });
  };
  EXPECT_EQ(of_dtypes(DType::kFloat32, DType::kBFloat16), "no error");
  EXPECT_EQ(of_dtypes(DType::kInt8, DType::kInt8),
            "adamw: parameters must be float32, float16 or bfloat16, got int8");
  const std::string beside_float32 =
      " parameter must have its dtype, or be float16 or bfloat16 beside float32, got ";
  EXPECT_EQ(of_dtypes(DType::kFloat32, DType::kInt8),
            "adamw: the gradient of a float32" + beside_float32 + "int8");
  EXPECT_EQ(of_dtypes(DType::kBFloat16, DType::kFloat32),
            "adamw: the gradient of a bfloat16" + beside_float32 + "float32");
  EXPECT_EQ(of_dtypes(DType::kFloat16, DType::kBFloat16),
            "adamw: the gradient of a float16" + beside_float32 + "bfloat16");
  EXPECT_EQ(message([](auto& args, auto&) { args.beta2 = 1.0; }),
            "adamw: beta1 and beta2 must be in [0, 1), got 0 and 1");
  EXPECT_EQ(message([](auto&, auto& tensor) { tensor.size = -1; }),
            "adamw: sizes must be >= 0, got -1");
  EXPECT_EQ(message([](auto&, auto& tensor) { tensor.step = nullptr; }),
            "adamw: steps must not be null");
  EXPECT_EQ(message([](auto&, auto& tensor) { tensor.size = 3; }),
            "adamw: parameters, gradients and moments must not be null, got one of 3 elements that "
            "is");
}

INSTANTIATE_TEST_SUITE_P(Devices, AdamWOn, kDevices,
                         [](const auto& info) { return name_of(info.param); });

/// The numbers of one step by an instruction set.
class AdamWWith : public ::testing::TestWithParam<cpu::Isa> {};

TEST_P(AdamWWith, EveryInstructionSetGivesTheSameNumbers) {
  MOQ_SKIP_WITHOUT_ISA(GetParam());
  const AdamWFactors factors = factors_of(step_of({.tensors = {},
                                                   .learning_rate = 0.01,
                                                   .beta1 = 0.9,
                                                   .beta2 = 0.999,
                                                   .weight_decay = 0.1,
                                                   .epsilon = 1e-8}),
                                          2.0F);
  for (const Types types : kTypes) {
    const Tensor tensor = random_tensor(1003, types, 2.0F, 17);
    std::vector<std::vector<std::byte>> results;
    for (const cpu::Isa isa : {cpu::Isa::kScalar, GetParam()}) {
      std::vector<std::byte> parameter = to_bytes(tensor.parameter, types.parameter);
      std::vector<std::byte> exp_avg = to_bytes(tensor.exp_avg, types.parameter);
      std::vector<std::byte> exp_avg_sq = to_bytes(tensor.exp_avg_sq, types.parameter);
      const std::vector<std::byte> gradient = to_bytes(tensor.gradient, types.gradient);
      MOQ_FUNCTION_OF(isa, adamw_elements)
      ({.parameter = parameter.data(),
        .gradient = gradient.data(),
        .exp_avg = exp_avg.data(),
        .exp_avg_sq = exp_avg_sq.data(),
        .size = tensor.size(),
        .parameter_dtype = types.parameter,
        .gradient_dtype = types.gradient},
       factors, 0, tensor.size());
      results.push_back(parameter);
      results.back().insert(results.back().end(), exp_avg.begin(), exp_avg.end());
      results.back().insert(results.back().end(), exp_avg_sq.begin(), exp_avg_sq.end());
    }
    EXPECT_EQ(results[0], results[1]);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, AdamWWith, kIsas,
                         [](const auto& info) { return std::string(cpu::name_of(info.param)); });

}  // namespace
}  // namespace moq::kernels::testing
