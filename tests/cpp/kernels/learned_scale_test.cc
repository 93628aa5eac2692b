// The derivatives of learned step sizes against their definition, summed in the documented order:
// number for number on both devices, and by every instruction set that ctest forces.
#include "kernels/learned_scale.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/learned_scale_pieces.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/learned_scale.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/child.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/float_support.h"
#include "tests/cpp/kernels/isa_axis.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;
using test::normal_vector;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Shape {
  std::int64_t rows;
  std::int64_t cols;
};

/// A weight, its learned grid, and what comes through it in either direction. Matrices are
/// row-major here, whatever their storage.
struct Problem {
  Shape shape;
  Granularity granularity = Granularity::kPerChannel;
  std::int64_t group_size = 0;
  DType dtype = DType::kFloat32;
  bool columns = false;      ///< are contiguous
  std::int64_t padding = 0;  ///< elements from row to row, or column to column, that are no one's
  std::int32_t num_bits = 3;
  float blend_ratio = 0.0F;
  std::vector<float> weight = {};
  std::vector<float> input = {};  ///< gradient of the output, or direction of the weight
  std::vector<float> absmax = {};
  std::vector<float> direction = {};  ///< of absmax

  FakeQuantizeTensor matrix() const {
    return {.input = weight.data(),
            .rows = shape.rows,
            .cols = shape.cols,
            .row_stride = columns ? 1 : shape.cols + padding,
            .col_stride = columns ? shape.rows + padding : 1,
            .group_size = group_size,
            .given_absmax = absmax.data(),
            .input_dtype = dtype,
            .output_dtype = dtype,
            .scale_dtype = dtype,
            .granularity = granularity,
            .scale_rule = ScaleRule::kGiven};
  }
  std::int64_t groups() const { return num_groups(matrix()); }
  std::int64_t size() const { return shape.rows * shape.cols; }

  Problem& fill() {
    weight = rounded(normal_vector(size(), 1), dtype);
    input = rounded(normal_vector(size(), 2), dtype);
    absmax = normal_vector(groups(), 3, 0.2F);
    for (float& value : absmax) {
      value += value < 0.0F ? -1.5F : 1.5F;  // some weights lie beyond
    }
    direction = normal_vector(groups(), 4);
    return *this;
  }
};

struct Result {
  std::vector<float> matrix;
  std::vector<float> absmax;
};

// -------------------------------------------------------------------------------- the definition

float sum_in_order(std::vector<float> numbers) {
  while (numbers.size() > 1) {
    std::vector<float> sums;
    for (std::size_t first = 0; first < numbers.size(); first += 512) {
      float lanes[64] = {};
      for (std::size_t i = first; i < std::min(first + 512, numbers.size()); ++i) {
        lanes[(i - first) % 64] += numbers[i];
      }
      for (int half = 32; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
          lanes[lane] += lanes[lane + half];
        }
      }
      sums.push_back(lanes[0]);
    }
    numbers = sums;
  }
  return numbers.empty() ? 0.0F : numbers[0];
}

struct Slopes {
  float weight;
  float step;
};

Slopes slopes_of(float weight, float absmax, int num_bits, DType dtype) {
  const auto qmax = static_cast<float>((1 << (num_bits - 1)) - 1);
  const float position = weight * (1.0F / stored_scale(std::fabs(absmax) / qmax, dtype));
  const float nearest = std::rint(position);
  if (std::fabs(nearest) <= qmax) {
    return {1.0F, nearest - position};
  }
  return {0.0F, position > 0.0F ? qmax : position < 0.0F ? -qmax : position};
}

/// Both derivatives: reduced to groups, and along directions. Sums of a group are those of its
/// rows' runs.
struct Expected {
  Result gradient;
  std::vector<float> tangent;
  std::vector<double> exact;  ///< the gradient's absmax in float64
  std::vector<double> bound;  ///< what it may be off by
};

Expected expected_of(const Problem& p) {
  const std::int64_t group_cols = columns_per_group(p.matrix());
  const std::int64_t groups = p.groups();
  const auto qmax = static_cast<float>((1 << (std::max(p.num_bits, 2) - 1)) - 1);
  const float share = 1.0F - p.blend_ratio;
  const auto by_absmax = [&](auto by_step, std::int64_t group) {
    const auto magnitude = by_step / qmax * share;
    return p.num_bits == 0 ? 0.0F : p.absmax[group] < 0.0F ? -magnitude : magnitude;
  };
  Expected expected;
  std::vector<std::vector<float>> sums(static_cast<std::size_t>(groups));
  std::vector<double> exact(static_cast<std::size_t>(groups));
  std::vector<double> magnitude(static_cast<std::size_t>(groups));
  for (std::int64_t row = 0; row < p.shape.rows; ++row) {
    for (std::int64_t col = 0, end = 0; col < p.shape.cols; col = end) {
      end = std::min({col + 512, (col / group_cols + 1) * group_cols});  // of a run: its group's
      const std::int64_t group = rows_share_scales(p.matrix())
                                     ? row / rows_per_group(p.matrix())
                                     : row * groups_per_row(p.matrix()) + col / group_cols;
      std::vector<float> run;
      for (std::int64_t c = col; c < end; ++c) {
        const std::int64_t i = row * p.shape.cols + c;
        const Slopes slopes = p.num_bits == 0
                                  ? Slopes{1.0F, 0.0F}
                                  : slopes_of(p.weight[i], p.absmax[group], p.num_bits, p.dtype);
        const float through_grid = p.input[i] * slopes.weight;
        const float through = p.num_bits == 0 || p.blend_ratio == 0.0F
                                  ? through_grid
                                  : p.input[i] * p.blend_ratio + through_grid * share;
        expected.gradient.matrix.push_back(through);
        expected.tangent.push_back(through + slopes.step * by_absmax(p.direction[group], group));
        run.push_back(p.input[i] * slopes.step);
        exact[group] += static_cast<double>(p.input[i]) * slopes.step;
        magnitude[group] += std::fabs(static_cast<double>(run.back()));
      }
      sums[group].push_back(sum_in_order(run));
    }
  }
  for (std::int64_t group = 0; group < groups; ++group) {
    expected.gradient.absmax.push_back(by_absmax(sum_in_order(sums[group]), group));
    expected.exact.push_back(p.num_bits == 0 ? 0.0 : by_absmax(exact[group], group));
    // A product, at most 8 + 6 additions of a run's numbers, as many of each further run's.
    expected.bound.push_back(64 * 0x1p-24 * magnitude[group] / qmax);
  }
  expected.gradient.matrix = rounded(expected.gradient.matrix, p.dtype);
  expected.tangent = rounded(expected.tangent, p.dtype);
  return expected;
}

// ------------------------------------------------------------------------------------ the kernels

/// A row-major matrix as it is stored, its gaps -7, or a storage as a row-major matrix.
std::vector<float> stored(const Problem& p, const std::vector<float>& values) {
  const FakeQuantizeTensor matrix = p.matrix();
  const std::int64_t lines = p.columns ? p.shape.cols : p.shape.rows;
  const std::int64_t stride = p.columns ? matrix.col_stride : matrix.row_stride;
  std::vector<float> storage(static_cast<std::size_t>(lines * stride), -7.0F);
  for (std::int64_t i = 0; i < p.size(); ++i) {
    storage[i / p.shape.cols * matrix.row_stride + i % p.shape.cols * matrix.col_stride] =
        values[i];
  }
  return storage;
}

std::vector<float> row_major(const Problem& p, std::vector<float> storage) {
  const FakeQuantizeTensor matrix = p.matrix();
  std::vector<float> values;
  for (std::int64_t i = 0; i < p.size(); ++i) {
    float& value =
        storage[i / p.shape.cols * matrix.row_stride + i % p.shape.cols * matrix.col_stride];
    values.push_back(value);
    value = -7.0F;
  }
  EXPECT_EQ(storage, std::vector<float>(storage.size(), -7.0F)) << "outside of the matrix";
  return values;
}

class Call {
 public:
  Call(Device device, const Problem& p)
      : device_(device),
        p_(p),
        weight_(device, to_bytes(stored(p, p.weight), p.dtype)),
        input_(device, to_bytes(stored(p, p.input), p.dtype)),
        output_(device, to_bytes(stored(p, std::vector<float>(p.size(), 5.0F)), p.dtype)),
        absmax_(device, p.absmax),
        direction_(device, p.direction),
        to_absmax_(device, std::vector<float>(p.absmax.size(), 5.0F)),
        num_bits_(device, {p.num_bits}),
        blend_ratio_(device, {p.blend_ratio}) {}

  Result gradient(bool of_weight = true) const {
    LearnedScaleGradientArgs args{.point = point(),
                                  .grad_output = input_.data(),
                                  .grad_weight = of_weight ? output_.data() : nullptr,
                                  .grad_absmax = to_absmax_.data()};
    if (device_ == Device::kCpu) {
      cpu::learned_scale_gradient(args);
    } else {
#if defined(MOQ_WITH_CUDA)
      const Buffer workspace(cuda::learned_scale_workspace_size(args.point.matrix));
      args.workspace = workspace.data();
      cuda::learned_scale_gradient(args, nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
#endif
    }
    return {output(), to_absmax_.read()};
  }

  std::vector<float> tangent() const {
    const LearnedScaleTangentArgs args{.point = point(),
                                       .weight_tangent = input_.data(),
                                       .absmax_tangent = direction_.data(),
                                       .output_tangent = output_.data()};
    if (device_ == Device::kCpu) {
      cpu::learned_scale_tangent(args);
    } else {
#if defined(MOQ_WITH_CUDA)
      cuda::learned_scale_tangent(args, nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
#endif
    }
    return output();
  }

 private:
  LearnedScale point() const {
    LearnedScale point{.matrix = p_.matrix(),
                       .num_bits = num_bits_.data(),
                       .blend_ratio = p_.blend_ratio == 0.0F ? nullptr : blend_ratio_.data()};
    point.matrix.input = weight_.data();
    point.matrix.given_absmax = absmax_.data();
    return point;
  }
  std::vector<float> output() const {
    return row_major(p_, from_bytes(output_.read(), p_.dtype));
  }

  Device device_;
  const Problem& p_;
  OnDevice<std::byte> weight_;
  OnDevice<std::byte> input_;
  OnDevice<std::byte> output_;
  OnDevice<float> absmax_;
  OnDevice<float> direction_;
  OnDevice<float> to_absmax_;
  OnDevice<std::int32_t> num_bits_;
  OnDevice<float> blend_ratio_;
};

/// Number for number, a NaN for a NaN.
void expect_same(const std::vector<float>& actual, const std::vector<float>& expected,
                 const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_TRUE(actual[i] == expected[i] || (std::isnan(actual[i]) && std::isnan(expected[i])))
        << what << ' ' << i << ": " << actual[i] << ", expected " << expected[i];
  }
}

void expect_derivatives(Device device, const Problem& p) {
  const Expected expected = expected_of(p);
  const Result gradient = Call(device, p).gradient();
  expect_same(gradient.matrix, expected.gradient.matrix, "gradient of weight");
  expect_same(gradient.absmax, expected.gradient.absmax, "gradient of absmax");
  for (std::size_t i = 0; i < expected.exact.size(); ++i) {
    ASSERT_FALSE(std::fabs(gradient.absmax[i] - expected.exact[i]) > expected.bound[i]) << i;
  }
  expect_same(Call(device, p).tangent(), expected.tangent, "derivative");
}

// ------------------------------------------------------------------------------------- every axis

struct Grouping {
  const char* name;
  Granularity granularity;
  std::int64_t cols = 0;  ///< the group's, of kPerGroup; 0: as many as a row has
};

using Axes = std::tuple<Device, Shape, bool, Grouping, DType>;

std::string axes_name(const ::testing::TestParamInfo<Axes>& info) {
  const auto& [device, shape, columns, grouping, dtype] = info.param;
  return name_of(device) + "_" + std::to_string(shape.rows) + "x" + std::to_string(shape.cols) +
         (columns ? "_columns_" : "_rows_") + grouping.name + "_" + moq::name_of(dtype);
}

class LearnedScaleEveryAxis : public ::testing::TestWithParam<Axes> {
 protected:
  void SetUp() override {
    MOQ_SKIP_WITHOUT(std::get<Device>(GetParam()));
    const auto& [_, shape, columns, grouping, dtype] = GetParam();
    problem.shape = shape;
    problem.columns = columns;
    problem.granularity = grouping.granularity;
    problem.dtype = dtype;
    if (grouping.granularity == Granularity::kPerGroup) {
      problem.group_size = grouping.cols != 0 ? std::gcd(grouping.cols, shape.cols) : shape.cols;
    } else if (grouping.granularity == Granularity::kPerRows) {
      problem.group_size = shape.rows % 3 == 0 ? 3 : 1;
    }
    problem.fill();
  }
  Device device = std::get<Device>(GetParam());
  Problem problem;
};

TEST_P(LearnedScaleEveryAxis, DerivativesAreTheDefinition) {
  expect_derivatives(device, problem);
}

TEST_P(LearnedScaleEveryAxis, ABlendLeavesTheWeightItsShare) {
  problem.blend_ratio = 0.3F;
  problem.num_bits = 5;
  problem.padding = 3;
  expect_derivatives(device, problem);
}

INSTANTIATE_TEST_SUITE_P(
    All, LearnedScaleEveryAxis,
    ::testing::Combine(kDevices,
                       ::testing::Values(Shape{1, 1}, Shape{3, 7}, Shape{33, 64}, Shape{9, 513},
                                         Shape{66, 1030}, Shape{3, 2048}),
                       ::testing::Bool(),
                       ::testing::Values(Grouping{"tensor", Granularity::kPerTensor},
                                         Grouping{"channel", Granularity::kPerChannel},
                                         Grouping{"group_of_2", Granularity::kPerGroup, 2},
                                         Grouping{"group_of_64", Granularity::kPerGroup, 64},
                                         Grouping{"group_of_all", Granularity::kPerGroup},
                                         Grouping{"three_rows", Granularity::kPerRows}),
                       ::testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16)),
    axes_name);

// --------------------------------------------------------------------- stores past the caches

using Streamed = std::tuple<cpu::Isa, bool, DType>;

class LearnedScaleStreamed : public ::testing::TestWithParam<Streamed> {};

std::string streamed_name(const ::testing::TestParamInfo<Streamed>& info) {
  const auto& [isa, columns, dtype] = info.param;
  return std::string(cpu::name_of(isa)) + (columns ? "_columns_" : "_rows_") + moq::name_of(dtype);
}

// Lines of memory begin where a streaming store may, but for what lies misplaced.
TEST_P(LearnedScaleStreamed, DerivativesAreTheDefinition) {
  const auto& [isa, columns, dtype] = GetParam();
  MOQ_SKIP_WITHOUT_ISA(isa);
  const Problem p = Problem{.shape = columns ? Shape{100, 70} : Shape{3, 490},
                            .dtype = dtype,
                            .columns = columns,
                            .padding = columns ? 28 : 22}
                        .fill();
  const Expected expected = expected_of(p);
  const std::vector<std::byte> weight = to_bytes(stored(p, p.weight), dtype);
  const std::vector<std::byte> input = to_bytes(stored(p, p.input), dtype);
  const std::vector<std::byte> blank =
      to_bytes(stored(p, std::vector<float>(static_cast<std::size_t>(p.size()), 5.0F)), dtype);
  for (const Derivative derivative : {Derivative::kGradient, Derivative::kTangent}) {
    for (const std::size_t misplaced : {0, 1}) {
      std::vector<std::byte> memory(blank.size() + 128);
      const std::size_t past_line = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
      std::byte* output = memory.data() + (64 - past_line) + misplaced * size_of(dtype);
      std::ranges::copy(blank, output);
      std::vector<float> sums(static_cast<std::size_t>(p.groups()));
      LearnedScaleCall call{.matrix = p.matrix(),
                            .num_bits = &p.num_bits,
                            .blend_ratio = nullptr,
                            .input = input.data(),
                            .absmax_tangent = p.direction.data(),
                            .output = output,
                            .sums = sums.data()};
      call.matrix.input = weight.data();
      MOQ_FUNCTION_OF(isa, learned_scale_rows)
      (call, derivative, 0, p.shape.rows, /*past_caches=*/true);
      const std::vector<float> found =
          row_major(p, from_bytes({output, output + blank.size()}, dtype));
      if (derivative == Derivative::kTangent) {
        expect_same(found, expected.tangent, "derivative");
        continue;
      }
      expect_same(found, expected.gradient.matrix, "gradient of weight");
      const LearnedWidth width(p.num_bits, nullptr);
      for (std::int64_t group = 0; group < p.groups(); ++group) {
        EXPECT_EQ(by_absmax(sums[group], call.matrix, group, width),
                  expected.gradient.absmax[group]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, LearnedScaleStreamed,
                         ::testing::Combine(kIsas, ::testing::Bool(),
                                            ::testing::Values(DType::kFloat32, DType::kFloat16,
                                                              DType::kBFloat16)),
                         streamed_name);

// ------------------------------------------------------------------------------------------- rest

class LearnedScaleOn : public ::testing::TestWithParam<Device> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT(GetParam()); }
};

TEST_P(LearnedScaleOn, LargeMatricesAreRightOnAllThreads) {
  const ThreadScope threads(2);
  for (const Granularity granularity : {Granularity::kPerTensor, Granularity::kPerChannel}) {
    for (const bool columns : {false, true}) {  // 6144 runs a tensor: three stages of sums
      expect_derivatives(
          GetParam(),
          Problem{
              .shape = {2048, 1025}, .granularity = granularity, .columns = columns, .num_bits = 8}
              .fill());
    }
  }
}

TEST_P(LearnedScaleOn, EveryWidthIsRight) {
  for (std::int32_t num_bits = 2; num_bits <= 16; ++num_bits) {
    expect_derivatives(GetParam(), Problem{.shape = {4, 100}, .num_bits = num_bits}.fill());
  }
}

TEST_P(LearnedScaleOn, AWidthOfZeroPassesThrough) {
  for (const bool columns : {false, true}) {
    expect_derivatives(
        GetParam(),
        Problem{
            .shape = {5, 70}, .columns = columns, .padding = 1, .num_bits = 0, .blend_ratio = 0.5F}
            .fill());
  }
}

TEST_P(LearnedScaleOn, LargeMatricesOfZeroWidthPassThrough) {
  const ThreadScope threads(2);
  for (const bool columns : {false, true}) {
    expect_derivatives(
        GetParam(),
        Problem{.shape = {2048, 1025}, .columns = columns, .padding = 15, .num_bits = 0}.fill());
  }
}

TEST(LearnedScale, TakesAllThreadsToPassThrough) {
  const Problem p = Problem{.shape = {2048, 1025}, .num_bits = 0}.fill();
  const Call call(Device::kCpu, p);
  const ThreadScope threads(2);
  EXPECT_EQ(status_of_child(
                [&] { return call.gradient().matrix == p.input && num_threads_alive() == 2; }),
            0);
}

TEST_P(LearnedScaleOn, TheGradientOfTheWeightMayBeLeftOut) {
  for (const bool columns : {false, true}) {
    const Problem p = Problem{.shape = {5, 70}, .columns = columns}.fill();
    const Result result = Call(GetParam(), p).gradient(/*of_weight=*/false);
    EXPECT_EQ(result.matrix, std::vector<float>(5 * 70, 5.0F));
    EXPECT_EQ(result.absmax, expected_of(p).gradient.absmax);
  }
}

TEST_P(LearnedScaleOn, NansStayInTheirGroups) {
  Problem p = Problem{.shape = {6, 70}}.fill();
  p.absmax[0] = kNan;
  p.absmax[1] = -kInfinity;
  p.weight[2 * 70 + 5] = kNan;
  p.input[3 * 70 + 5] = kNan;
  p.input[4 * 70 + 5] = kInfinity;
  const Result result = Call(GetParam(), p).gradient();
  for (int group = 0; group < 6; ++group) {
    EXPECT_EQ(std::isfinite(result.absmax[group]), group == 5) << group;
  }
  for (int i = 0; i < 6 * 70; ++i) {
    EXPECT_EQ(std::isfinite(result.matrix[i]), i != 3 * 70 + 5 && i != 4 * 70 + 5) << i;
  }
}

TEST_P(LearnedScaleOn, AnInfiniteGradientOfAClippedWeightIsNotLost) {
  Problem p = Problem{.shape = {1, 3}}.fill();
  p.weight[1] = 100.0F;
  p.input[1] = kInfinity;
  EXPECT_FALSE(std::isfinite(Call(GetParam(), p).gradient().matrix[1]));  // or GradScaler misses it
}

TEST_P(LearnedScaleOn, NothingHasNoGradient) {
  for (const Shape shape : {Shape{0, 5}, Shape{5, 0}, Shape{0, 0}}) {
    const Problem p = Problem{.shape = shape}.fill();
    EXPECT_EQ(Call(GetParam(), p).gradient().absmax, std::vector<float>(p.absmax.size(), 0.0F));
    EXPECT_TRUE(Call(GetParam(), p).tangent().empty());
  }
  const Problem p = Problem{.shape = {0, 5}, .granularity = Granularity::kPerTensor}.fill();
  EXPECT_EQ(Call(GetParam(), p).gradient().absmax, std::vector<float>{0.0F});
}

TEST_P(LearnedScaleOn, BadArgumentsAreNamed) {
  const auto message = [&](const LearnedScaleGradientArgs& args) {
    return error_of([&] {
      if (GetParam() == Device::kCpu) {
        cpu::learned_scale_gradient(args);
      } else {
#if defined(MOQ_WITH_CUDA)
        cuda::learned_scale_gradient(args, nullptr);
#endif
      }
    });
  };
  const Problem p = Problem{.shape = {2, 4}}.fill();
  const OnDevice<float> memory(GetParam(), std::vector<float>(8, 1.0F));
  const OnDevice<std::int32_t> num_bits(GetParam(), {4});
  LearnedScaleGradientArgs args{.point = {.matrix = p.matrix(), .num_bits = num_bits.data()},
                                .grad_output = memory.data(),
                                .grad_absmax = memory.data()};
  args.point.matrix.input = memory.data();
  args.point.matrix.given_absmax = memory.data();
  LearnedScaleGradientArgs bad = args;
  bad.point.num_bits = nullptr;
  EXPECT_EQ(message(bad), "learned_scale: num_bits must not be null");
  bad = args;
  bad.grad_output = nullptr;
  EXPECT_EQ(message(bad), "learned_scale: what is read and written must not be null");
  bad = args;
  bad.grad_absmax = nullptr;
  EXPECT_EQ(message(bad), "learned_scale: grad_absmax must not be null");
  bad = args;
  bad.point.matrix.row_stride = 9;
  bad.point.matrix.col_stride = 2;
  EXPECT_EQ(message(bad), "learned_scale: row_stride or col_stride must be 1, got 9 and 2");
  bad = args;
  bad.point.matrix.scale_rule = ScaleRule::kExtent;
  EXPECT_EQ(message(bad), "learned_scale: scales must be given and rounding nearest, got others");
  bad = args;
  bad.point.matrix.granularity = Granularity::kPerGroup;
  bad.point.matrix.group_size = 3;
  EXPECT_EQ(message(bad),
            "learned_scale: group_size of the weight must divide its columns, got 3 and 4");
  if (GetParam() == Device::kCpu) {
    const std::int32_t one = 1;
    bad = args;
    bad.point.num_bits = &one;
    EXPECT_EQ(message(bad), "learned_scale: num_bits must be 0 or in [2, 16], got 1");
    const float two = 2.0F;
    bad = args;
    bad.point.blend_ratio = &two;
    EXPECT_EQ(message(bad), "learned_scale: blend_ratio must be in [0, 1], got 2");
  } else {
    bad = args;
    bad.point.matrix.cols = 1024;
    bad.point.matrix.rows = 1;
    EXPECT_EQ(message(bad), "learned_scale: workspace must not be null");
  }
}

INSTANTIATE_TEST_SUITE_P(All, LearnedScaleOn, kDevices,
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace moq::kernels::testing
