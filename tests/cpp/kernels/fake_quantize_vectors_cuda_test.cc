// The kernels of fake_quantize for whole vectors and for small groups: which matrices they take,
// and the bits that they give.
#include <gtest/gtest.h>

#include <cstddef>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/fake_quantize_groups.h"
#include "kernels/cuda/fake_quantize_vectors.h"
#include "kernels/fake_quantize.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/fake_quantize_axes.h"
#include "tests/cpp/kernels/fake_quantize_on_gpu.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"

namespace moq::kernels::testing {
namespace {

/// The call's result, and what it should be.
void expect_vectors_right(const Case& c, const std::vector<std::pair<int, float> >& values = {}) {
  Problem problem(c);
  for (const auto& [column, value] : values) {
    problem.set(c.rows / 2, column, value);
  }
  const DeviceProblem device{problem};
  FakeQuantizeTensor tensor = device.tensor();
  tensor.codes = nullptr;
  ASSERT_TRUE(cuda::takes_vectors(tensor)) << c;
  const Buffer num_bits(&c.num_bits, sizeof(std::int32_t));
  const Buffer blend_ratio(&c.blend_ratio, sizeof(float));
  const Buffer step(&c.step, sizeof(std::int64_t));
  cuda::fake_quantize({.tensors = {&tensor, 1},
                       .num_bits = num_bits.as<std::int32_t>(),
                       .blend_ratio = blend_ratio.as<float>(),
                       .seed = c.seed,
                       .step = step.as<std::int64_t>()},
                      nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  Result expected = reference(problem);
  expected.codes = problem.blank.codes;
  EXPECT_EQ(device.result(), expected) << c;
}

using Vectors = std::tuple<Shape, Storage, QuantMode, Rounding, DType, DType>;

class FakeQuantizeCudaVectors : public ::testing::TestWithParam<Vectors> {
 protected:
  static Case vectors() {
    const auto& [shape, storage, mode, rounding, input, output] = GetParam();
    return {.rows = shape.first,
            .cols = shape.second,
            .storage = storage,
            .mode = mode,
            .rounding = rounding,
            .input_dtype = input,
            .output_dtype = output,
            .scale_dtype = output,
            .first_element = 4096,
            .padding = 8};
  }
};

TEST_P(FakeQuantizeCudaVectors, GiveTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  Case c = vectors();
  for (const int num_bits : {8, 2, 4, 16}) {
    c.num_bits = num_bits;
    expect_vectors_right(c);
  }
}

TEST_P(FakeQuantizeCudaVectors, OfAPartBlendAsTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  Case c = vectors();
  c.blend_ratio = 0.3F;
  c.unsharded_cols = c.cols + 40;
  expect_vectors_right(c);
}

TEST_P(FakeQuantizeCudaVectors, OfABadRowAreNaNAndTheOthersNot) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    expect_vectors_right(vectors(), {{3, bad}});
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, FakeQuantizeCudaVectors,
    ::testing::Combine(::testing::Values(Shape{4, 8}, Shape{36, 104}, Shape{32, 1024},
                                         Shape{68, 1032}, Shape{4, 2056}, Shape{12, 4096},
                                         Shape{8, 8192}, Shape{4, 12296}),
                       ::testing::Values(Storage::kLinear, Storage::kConv1d),
                       ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric), kRoundings,
                       ::testing::Values(DType::kFloat32), ::testing::Values(DType::kFloat32)));

INSTANTIATE_TEST_SUITE_P(
    HalfBlocks, FakeQuantizeCudaVectors,
    ::testing::Combine(::testing::Values(Shape{4, 4}, Shape{36, 100}, Shape{4, 12292}),
                       ::testing::Values(Storage::kLinear),
                       ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric),
                       ::testing::Values(Rounding::kNearest), ::testing::Values(DType::kFloat32),
                       kFloats));

INSTANTIATE_TEST_SUITE_P(DTypes, FakeQuantizeCudaVectors,
                         ::testing::Combine(::testing::Values(Shape{36, 264}),
                                            ::testing::Values(Storage::kLinear, Storage::kConv1d),
                                            ::testing::Values(QuantMode::kSymmetric), kRoundings,
                                            kFloats, kFloats));

TEST(FakeQuantizeCudaOfVectors, VectorsOfGroupsGiveTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const std::int64_t group_size : {8, 32, 128, 1024, 4096}) {
    expect_vectors_right({.rows = 5,
                          .cols = 2 * group_size,
                          .granularity = Granularity::kPerGroup,
                          .rounding = Rounding::kStochastic,
                          .group_size = group_size,
                          .padding = 0});
  }
}

// ---- The same in groups that a few lanes hold.

using Groups = std::tuple<std::int64_t, QuantMode, Rounding, DType, DType>;

class FakeQuantizeCudaGroups : public ::testing::TestWithParam<Groups> {
 protected:
  /// `columns` groups in each of `rows` rows.
  static Case groups(std::int64_t rows, std::int64_t columns) {
    const auto& [group_size, mode, rounding, input, output] = GetParam();
    return {.rows = rows,
            .cols = columns * group_size,
            .granularity = columns == 1 ? Granularity::kPerChannel : Granularity::kPerGroup,
            .mode = mode,
            .rounding = rounding,
            .group_size = columns == 1 ? 0 : group_size,
            .input_dtype = input,
            .output_dtype = output,
            .scale_dtype = output,
            .first_element = 4096,
            .padding = 0};
  }

  static void expect_right(const Case& c, const std::vector<std::pair<int, float> >& values = {}) {
    const Problem problem(c);
    const DeviceProblem device{problem};
    FakeQuantizeTensor tensor = device.tensor();
    tensor.codes = nullptr;
    ASSERT_TRUE(cuda::takes_groups(tensor)) << c;
    expect_vectors_right(c, values);
  }
};

TEST_P(FakeQuantizeCudaGroups, GiveTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const auto& [rows, columns] : {Shape{1, 1}, Shape{5, 3}, Shape{37, 2}, Shape{3, 65}}) {
    Case c = groups(rows, columns);
    for (const int num_bits : {8, 2, 4, 16}) {
      c.num_bits = num_bits;
      expect_right(c);
    }
  }
}

TEST_P(FakeQuantizeCudaGroups, BlendAndHoldNaNAsTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  Case c = groups(5, 3);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    expect_right(c, {{3, bad}});
  }
  c.blend_ratio = 0.3F;
  expect_right(c);
  expect_right(c, {{0, std::numeric_limits<float>::quiet_NaN()}});
}

TEST_P(FakeQuantizeCudaGroups, OfWidthsWithoutAGridAreAsOfOtherMatrices) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const int num_bits : {0, 1, 17}) {  // a copy, NaN and NaN
    Case c = groups(5, 3);
    c.num_bits = num_bits;
    const Problem problem(c);
    const DeviceProblem device{problem};
    FakeQuantizeTensor tensor = device.tensor();
    tensor.codes = nullptr;
    ASSERT_TRUE(cuda::takes_groups(tensor)) << c;
    const Buffer width(&num_bits, sizeof(std::int32_t));
    cuda::fake_quantize({.tensors = {&tensor, 1}, .num_bits = width.as<std::int32_t>()}, nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    const Result expected = run(problem);  // with codes, by the other kernel
    EXPECT_EQ(device.result().output, expected.output) << c;
    EXPECT_EQ(device.result().scales, expected.scales) << c;
    EXPECT_EQ(device.result().zero_points, expected.zero_points) << c;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, FakeQuantizeCudaGroups,
    ::testing::Combine(::testing::Values(8, 16, 32, 64, 128),
                       ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric), kRoundings,
                       ::testing::Values(DType::kFloat32), ::testing::Values(DType::kFloat32)));
// A vector by itself: without draws that vectors share, one of float32 is 4 columns.
INSTANTIATE_TEST_SUITE_P(Vector, FakeQuantizeCudaGroups,
                         ::testing::Combine(::testing::Values(4),
                                            ::testing::Values(QuantMode::kSymmetric,
                                                              QuantMode::kAsymmetric),
                                            ::testing::Values(Rounding::kNearest),
                                            ::testing::Values(DType::kFloat32), kFloats));
// In 16 bits a lane has 8 columns, and a whole warp 256.
INSTANTIATE_TEST_SUITE_P(
    HalfSizes, FakeQuantizeCudaGroups,
    ::testing::Combine(::testing::Values(8, 16, 256),
                       ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric), kRoundings,
                       ::testing::Values(DType::kFloat16, DType::kBFloat16),
                       ::testing::Values(DType::kFloat32, DType::kBFloat16)));

INSTANTIATE_TEST_SUITE_P(DTypes, FakeQuantizeCudaGroups,
                         ::testing::Combine(::testing::Values(64),
                                            ::testing::Values(QuantMode::kSymmetric), kRoundings,
                                            kFloats, kFloats));

TEST(FakeQuantizeCudaOfVectors, OnlyOneArrayOfGroupsIsTakenAsSuch) {
  const auto takes = [](const Case& c) {
    const Problem problem(c);
    alignas(16) static std::byte memory[64];
    FakeQuantizeTensor tensor = problem.tensor(memory, memory, nullptr, nullptr, nullptr);
    return cuda::takes_vectors(tensor) && cuda::takes_groups(tensor);
  };
  const Case whole{.rows = 4,
                   .cols = 128,
                   .granularity = Granularity::kPerGroup,
                   .group_size = 64,
                   .padding = 0};
  EXPECT_TRUE(takes(whole));
  Case changed = whole;
  changed.padding = 8;
  EXPECT_FALSE(takes(changed));
  changed = whole;
  changed.cols = 48 * 4;
  changed.group_size = 48;  // 12 lanes
  EXPECT_FALSE(takes(changed));
  changed = whole;
  changed.cols = 512;
  changed.group_size = 256;  // 64 lanes
  EXPECT_FALSE(takes(changed));
  changed.input_dtype = DType::kFloat16;  // 32
  EXPECT_TRUE(takes(changed));
  changed.cols = 1024;
  changed.group_size = 512;
  EXPECT_FALSE(takes(changed));
  changed = whole;
  changed.group_size = 4;  // 1
  EXPECT_TRUE(takes(changed));
  changed = whole;
  changed.unsharded_cols = 256;
  EXPECT_FALSE(takes(changed));
}

TEST(FakeQuantizeCudaOfVectors, VectorsAreCopiedAtZeroBits) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const Storage storage : {Storage::kLinear, Storage::kConv1d}) {
    const Problem problem(
        Case{.rows = 8, .cols = 48, .storage = storage, .num_bits = 0, .padding = 0});
    const DeviceProblem device{problem};
    FakeQuantizeTensor tensor = device.tensor();
    tensor.codes = nullptr;
    ASSERT_TRUE(cuda::takes_vectors(tensor));
    const Buffer num_bits(&problem.parameters.num_bits, sizeof(std::int32_t));
    cuda::fake_quantize({.tensors = {&tensor, 1}, .num_bits = num_bits.as<std::int32_t>()},
                        nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    EXPECT_EQ(device.result().output, problem.input);
    EXPECT_EQ(device.result().scales, problem.blank.scales);
  }
}

TEST(FakeQuantizeCudaOfVectors, OnlyWholeAlignedVectorsAreTakenAsSuch) {
  const auto takes = [](const Case& c, const auto& change) {
    const Problem problem(c);
    alignas(16) static std::byte memory[64];
    FakeQuantizeTensor tensor = problem.tensor(memory, memory, nullptr, nullptr, nullptr);
    change(tensor);
    return cuda::takes_vectors(tensor);
  };
  const auto as_it_is = [](FakeQuantizeTensor&) {};
  const Case whole{.rows = 8, .cols = 8, .padding = 0};
  EXPECT_TRUE(takes(whole, as_it_is));
  EXPECT_TRUE(takes({.rows = 8, .cols = 12, .padding = 0}, as_it_is));
  EXPECT_FALSE(takes({.rows = 8, .cols = 12, .storage = Storage::kConv1d, .padding = 0}, as_it_is));
  EXPECT_FALSE(
      takes({.rows = 8, .cols = 12, .rounding = Rounding::kStochastic, .padding = 0}, as_it_is));
  EXPECT_FALSE(
      takes({.rows = 8, .cols = 12, .input_dtype = DType::kBFloat16, .padding = 0}, as_it_is));
  EXPECT_FALSE(takes({.rows = 8, .cols = 7, .padding = 1}, as_it_is));
  EXPECT_FALSE(takes({.rows = 8, .cols = 8, .padding = 1}, as_it_is));
  EXPECT_FALSE(takes({.rows = 6, .cols = 8, .storage = Storage::kConv1d, .padding = 2}, as_it_is));
  EXPECT_FALSE(takes({.rows = 8, .cols = 8, .storage = Storage::kScattered}, as_it_is));
  EXPECT_FALSE(takes({.rows = 8, .cols = 8, .mode = QuantMode::kTernary, .padding = 0}, as_it_is));
  EXPECT_FALSE(takes({.rows = 8, .cols = 8, .granularity = Granularity::kPerTensor, .padding = 0},
                     as_it_is));
  EXPECT_FALSE(
      takes({.rows = 8, .cols = 8, .scale_rule = ScaleRule::kMse, .padding = 0}, as_it_is));
  EXPECT_FALSE(takes(
      {.rows = 8, .cols = 8, .rounding = Rounding::kStochastic, .first_element = 4, .padding = 0},
      as_it_is));
  EXPECT_FALSE(takes({.rows = 8,
                      .cols = 8,
                      .rounding = Rounding::kStochastic,
                      .first_element = (std::int64_t{1} << 35) - 8,
                      .padding = 0},
                     as_it_is));
  EXPECT_FALSE(takes(
      whole, [](auto& tensor) { tensor.input = static_cast<const std::byte*>(tensor.input) + 4; }));
  EXPECT_FALSE(takes(whole, [](auto& tensor) { tensor.codes = tensor.output; }));
  EXPECT_FALSE(takes(whole, [](auto& tensor) { tensor.output = nullptr; }));
}

// Rows that are held, and longer ones, which are read anew when some of them is written.
TEST(FakeQuantizeCudaOfVectors, VectorsInPlaceGiveTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const Storage storage : {Storage::kLinear, Storage::kConv1d}) {
    for (const std::int64_t cols : {256, 8192, 12296, 40000}) {
      Problem problem(Case{.rows = 36,
                           .cols = cols,
                           .storage = storage,
                           .rounding = Rounding::kStochastic,
                           .padding = 0});
      problem.blank.output = problem.input;
      Call call(problem, /*in_place=*/true, /*with_codes=*/false);
      call.enqueue(nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      Result expected = reference(problem);
      expected.codes = problem.blank.codes;
      EXPECT_EQ(call.result(), expected) << problem.parameters;
    }
  }
}

TEST(FakeQuantizeCudaOfVectors, MoreVectorsOfEveryKindThanOneLaunchCarriesEqualEachAlone) {
  MOQ_SKIP_WITHOUT_GPU();
  std::vector<Problem> problems;
  for (int i = 0; i < 900; ++i) {
    problems.emplace_back(Case{.rows = 4 * (1 + i % 3),
                               .cols = 8 * (1 + i % 41),
                               .storage = static_cast<Storage>(i % 2),
                               .mode = static_cast<QuantMode>(i / 2 % 2),
                               .rounding = static_cast<Rounding>(i / 4 % 2),
                               .num_bits = i % 19 == 0 ? 0 : 2 + i % 7,
                               .output_dtype = i % 5 == 0 ? DType::kBFloat16 : DType::kFloat32,
                               .first_element = 4 * i,
                               .padding = 0,
                               .name_hash = static_cast<std::uint32_t>(i)});
  }
  const std::vector<Result> results = run_all(problems, [](std::size_t i) { return i % 7 == 0; });
  for (std::size_t i = 0; i < problems.size(); ++i) {
    const Problem& problem = problems[i];
    Result expected = problem.parameters.num_bits == 0 ? results[i] : reference(problem);
    if (i % 7 != 0) {
      expected.codes = problem.blank.codes;
    }
    EXPECT_EQ(results[i], expected) << i << ": " << problem.parameters;
  }
}

}  // namespace
}  // namespace moq::kernels::testing
