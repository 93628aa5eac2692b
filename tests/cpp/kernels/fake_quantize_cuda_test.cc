// The CUDA body of fake_quantize against the definition, bit for bit, over the same axes as the
// CPU's.
#include <gtest/gtest.h>

#include "kernels/fake_quantize.h"

#include "tests/cpp/kernels/device.h"

#if !defined(MOQ_WITH_CUDA)

TEST(FakeQuantizeCuda, NeedsABuildWithCuda) {
  MOQ_SKIP_WITHOUT_GPU();
}

#else

#include <cstddef>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/cuda/fake_quantize_groups.h"
#include "kernels/cuda/fake_quantize_vectors.h"
#include "tests/cpp/kernels/fake_quantize_axes.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"

namespace moq::kernels::testing {
namespace {

/// A problem's memory on the device.
struct DeviceProblem {
  const Problem& problem;
  Buffer input{problem.input};
  Buffer given_absmax{problem.given_absmax};
  Buffer output{problem.blank.output};
  Buffer codes{problem.blank.codes};
  Buffer scales{problem.blank.scales};
  Buffer zero_points{problem.blank.zero_points};

  FakeQuantizeTensor tensor() const {
    FakeQuantizeTensor tensor = problem.tensor(input.data(), output.data(), codes.data(),
                                               scales.data(), zero_points.as<std::int32_t>());
    if (tensor.given_absmax != nullptr) {
      tensor.given_absmax = given_absmax.as<float>();
    }
    return tensor;
  }

  Result result() const {
    Result result = problem.blank;
    output.copy_to(result.output);
    codes.copy_to(result.codes);
    scales.copy_to(result.scales);
    zero_points.copy_to(result.zero_points);
    return result;
  }
};

/// One call for all problems; they share seed and step. with_codes(i): whether those of the i-th
/// are wanted.
template <typename WithCodes>
std::vector<Result> run_all(const std::vector<Problem>& problems, const WithCodes& with_codes) {
  std::vector<DeviceProblem> devices;
  devices.reserve(problems.size());
  std::vector<FakeQuantizeTensor> tensors;
  std::vector<std::int32_t> num_bits;
  std::vector<float> blend_ratio;
  for (const Problem& problem : problems) {
    devices.push_back({problem});
    tensors.push_back(devices.back().tensor());
    if (!with_codes(tensors.size() - 1)) {
      tensors.back().codes = nullptr;
    }
    num_bits.push_back(problem.parameters.num_bits);
    blend_ratio.push_back(problem.parameters.blend_ratio);
  }
  const Buffer num_bits_dev(num_bits);
  const Buffer blend_ratio_dev(blend_ratio);
  const Buffer step_dev(&problems[0].parameters.step, sizeof(std::int64_t));
  const Buffer workspace(cuda::fake_quantize_workspace_size(tensors));
  cuda::fake_quantize({.tensors = tensors,
                       .num_bits = num_bits_dev.as<std::int32_t>(),
                       .blend_ratio = blend_ratio_dev.as<float>(),
                       .seed = problems[0].parameters.seed,
                       .step = step_dev.as<std::int64_t>(),
                       .workspace = workspace.data()},
                      nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<Result> results;
  for (const DeviceProblem& device : devices) results.push_back(device.result());
  return results;
}

std::vector<Result> run_all(const std::vector<Problem>& problems) {
  return run_all(problems, [](std::size_t) { return true; });
}

Result run(const Problem& problem) {
  return run_all({problem})[0];
}

class FakeQuantizeCudaEveryAxis : public ::testing::TestWithParam<Axes> {};

TEST_P(FakeQuantizeCudaEveryAxis, GivesTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  const Problem problem(case_of(GetParam()));
  EXPECT_EQ(run(problem), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaEveryAxis,
                         ::testing::Combine(kShapes, kStorages, kGranularities, kModes, kRoundings),
                         axes_name);

class FakeQuantizeCudaEverySearch : public ::testing::TestWithParam<Searches> {};

TEST_P(FakeQuantizeCudaEverySearch, GivesTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  const Problem problem(case_of(GetParam()));
  EXPECT_EQ(run(problem), reference(problem));
}

TEST_P(FakeQuantizeCudaEverySearch, BlendsAsTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  Case c = case_of(GetParam());
  c.blend_ratio = 0.3F;
  const Problem problem(c);
  EXPECT_EQ(run(problem), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaEverySearch,
                         ::testing::Combine(kSearchShapes, kStorages, kGranularities, kFloats,
                                            kSearches),
                         searches_name);

class FakeQuantizeCudaEveryDType : public ::testing::TestWithParam<DTypes> {};

TEST_P(FakeQuantizeCudaEveryDType, GivesTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  const Problem problem(case_of(GetParam()));
  EXPECT_EQ(run(problem), reference(problem));
}

TEST_P(FakeQuantizeCudaEveryDType, BlendsAndStoresWideCodesAsTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  Case c = case_of(GetParam());
  c.blend_ratio = 0.3F;
  c.num_bits = 13;
  c.codes_dtype = DType::kInt16;
  const Problem problem(c);
  EXPECT_EQ(run(problem), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaEveryDType,
                         ::testing::Combine(kFloats, kFloats, kStorages, kRoundings), dtypes_name);

class FakeQuantizeCudaBadGroup : public ::testing::TestWithParam<BadGroup> {};

TEST_P(FakeQuantizeCudaBadGroup, GivesNaNThroughoutAndLeavesTheOthersAlone) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const float blend_ratio : {0.0F, 0.5F}) {
    const Problem problem = problem_of(GetParam(), blend_ratio);
    EXPECT_EQ(run(problem), reference(problem));
  }
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaBadGroup,
                         ::testing::Combine(kStorages, kGranularities, kAllModes, kNonFinite));

// 4096 and more columns give a run to a whole block, and cut a row with one scale into segments.
class FakeQuantizeCudaLongRows
    : public ::testing::TestWithParam<std::tuple<Granularity, Rounding, std::int64_t> > {};

TEST_P(FakeQuantizeCudaLongRows, GivesTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  const auto [granularity, rounding, cols] = GetParam();
  const Problem problem(Case{.rows = 3,
                             .cols = cols,
                             .granularity = granularity,
                             .mode = QuantMode::kAsymmetric,
                             .rounding = rounding,
                             .input_dtype = DType::kBFloat16});
  EXPECT_EQ(run(problem), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaLongRows,
                         ::testing::Combine(kGranularities, kRoundings,
                                            ::testing::Values(2048, 4099, 12288, 50257)));

TEST(FakeQuantizeCuda, MoreTensorsThanOneLaunchCarriesEqualEachAlone) {
  MOQ_SKIP_WITHOUT_GPU();
  std::vector<Problem> problems;
  for (int i = 0; i < 600; ++i) {
    problems.emplace_back(Case{.rows = i % 7,
                               .cols = 1 + i % 41,
                               .storage = static_cast<Storage>(i % 3),
                               .granularity = static_cast<Granularity>(i % 4),
                               .mode = static_cast<QuantMode>(i % 4),
                               .rounding = static_cast<Rounding>(i % 4 < 2 ? i / 4 % 2 : 0),
                               .scale_rule = i % 5 == 0 ? ScaleRule::kMse : ScaleRule::kExtent,
                               .num_bits = i % 4 == 3 ? 1 + i % 3 : 2 + i % 7,
                               .first_element = i,
                               .name_hash = static_cast<std::uint32_t>(i)});
  }
  const std::vector<Result> results = run_all(problems);
  for (std::size_t i = 0; i < problems.size(); ++i) {
    EXPECT_EQ(results[i], reference(problems[i])) << i << ": " << problems[i].parameters;
  }
}

// ---- What lies in whole, aligned vectors, and is wanted without codes.

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

TEST(FakeQuantizeCuda, VectorsOfGroupsGiveTheBitsOfTheDefinition) {
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

TEST(FakeQuantizeCuda, OnlyOneArrayOfGroupsIsTakenAsSuch) {
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

TEST(FakeQuantizeCuda, VectorsAreCopiedAtZeroBits) {
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

TEST(FakeQuantizeCuda, OnlyWholeAlignedVectorsAreTakenAsSuch) {
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

TEST(FakeQuantizeCuda, CopiesAtZeroBits) {
  MOQ_SKIP_WITHOUT_GPU();
  Problem problem(Case{.rows = 5, .cols = 43, .num_bits = 0});
  problem.set(1, 1, std::numeric_limits<float>::infinity());
  Result expected = problem.blank;
  for (std::int64_t row = 0; row < 5; ++row) {
    for (std::int64_t col = 0; col < 43; ++col) {
      put_float(expected.output, DType::kFloat32, problem.place(row, col), problem.get(row, col));
    }
  }
  EXPECT_EQ(run(problem), expected);
}

TEST(FakeQuantizeCuda, ABitWidthWithoutAGridGivesNaN) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const int num_bits : {1, 9, 17, -3}) {  // 9 is too wide for int8 codes
    Problem problem(Case{.rows = 2, .cols = 5});
    problem.parameters.num_bits = num_bits;
    const Result result = run(problem);
    for (std::int64_t i = 0; i < 10; ++i) {
      float value;
      std::memcpy(&value, result.output.data() + problem.place(i / 5, i % 5) * sizeof(float),
                  sizeof(float));
      EXPECT_TRUE(std::isnan(value)) << num_bits;
      EXPECT_EQ(result.codes[static_cast<std::size_t>(i)], std::byte{0});
    }
  }
}

/// One problem with its call's device memory, for the tests that change that memory.
class Call {
 public:
  explicit Call(const Problem& problem, bool in_place = false, bool with_codes = true)
      : device_{problem}, tensor_(device_.tensor()) {
    if (in_place) {
      tensor_.input = tensor_.output;
    }
    if (!with_codes) {
      tensor_.codes = nullptr;
      EXPECT_TRUE(cuda::takes_vectors(tensor_)) << problem.parameters;
    }
  }

  void enqueue(cudaStream_t stream) {
    cuda::fake_quantize({.tensors = {&tensor_, 1},
                         .num_bits = num_bits_.as<std::int32_t>(),
                         .seed = device_.problem.parameters.seed,
                         .step = step_.as<std::int64_t>(),
                         .skip = skip_.as<float>(),
                         .workspace = workspace_.data()},
                        stream);
  }
  void set_num_bits(std::int32_t num_bits) { set(num_bits_, num_bits); }
  void set_step(std::int64_t step) { set(step_, step); }
  void set_skip(float skip) { set(skip_, skip); }
  Result result() const { return device_.result(); }

 private:
  template <typename Value>
  static void set(const Buffer& buffer, Value value) {
    MOQ_CUDA_CHECK(cudaMemcpy(buffer.data(), &value, sizeof(value), cudaMemcpyHostToDevice));
  }

  DeviceProblem device_;
  FakeQuantizeTensor tensor_;
  Buffer num_bits_{&device_.problem.parameters.num_bits, sizeof(int)};
  Buffer step_{&device_.problem.parameters.step, sizeof(std::int64_t)};
  Buffer skip_{std::vector<float>{0.0F}};
  Buffer workspace_{cuda::fake_quantize_workspace_size({&tensor_, 1})};
};

class FakeQuantizeCudaInPlace : public ::testing::TestWithParam<InPlace> {};

TEST_P(FakeQuantizeCudaInPlace, GivesTheBitsOfTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  const Problem problem = problem_of(GetParam());
  Call call(problem, /*in_place=*/true);
  call.enqueue(nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  EXPECT_EQ(call.result(), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaInPlace,
                         ::testing::Combine(kStorages, kGranularities, kFloats), in_place_name);

TEST(FakeQuantizeCuda, ASkippedStepWritesNothing) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const Granularity granularity : {Granularity::kPerTensor, Granularity::kPerChannel}) {
    const Problem problem(Case{.rows = 7, .cols = 11, .granularity = granularity});
    Call call(problem);
    call.set_skip(1.0F);
    call.enqueue(nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    EXPECT_EQ(call.result(), problem.blank);
  }
  for (const Storage storage : {Storage::kLinear, Storage::kConv1d}) {
    const Problem problem(Case{.rows = 8, .cols = 16, .storage = storage, .padding = 0});
    Call call(problem, /*in_place=*/false, /*with_codes=*/false);
    call.set_skip(1.0F);
    call.enqueue(nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    EXPECT_EQ(call.result(), problem.blank);
  }
}

// Rows that are held, and longer ones, which are read anew when some of them is written.
TEST(FakeQuantizeCuda, VectorsInPlaceGiveTheBitsOfTheDefinition) {
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

TEST(FakeQuantizeCuda, MoreVectorsOfEveryKindThanOneLaunchCarriesEqualEachAlone) {
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

TEST(FakeQuantizeCuda, ACapturedGraphFollowsTheBitWidthAndTheStep) {
  MOQ_SKIP_WITHOUT_GPU();
  const Case cases[] = {
      {.rows = 33, .cols = 130, .granularity = Granularity::kPerTensor},
      {.rows = 33, .cols = 130},
      {.rows = 32, .cols = 136, .padding = 0},  // these two in vectors, without codes
      {.rows = 32, .cols = 136, .storage = Storage::kConv1d, .padding = 0}};
  for (Case c : cases) {
    c.rounding = Rounding::kStochastic;
    Problem problem(c);
    Call call(problem, /*in_place=*/false, /*with_codes=*/c.padding != 0);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    MOQ_CUDA_CHECK(cudaStreamCreate(&stream));
    MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    call.enqueue(stream);
    MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    for (const int num_bits : {8, 6, 4}) {
      problem.parameters.num_bits = num_bits;
      problem.parameters.step = 100 + num_bits;
      call.set_num_bits(num_bits);
      call.set_step(100 + num_bits);
      MOQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
      MOQ_CUDA_CHECK(cudaStreamSynchronize(stream));
      Result expected = reference(problem);
      if (c.padding == 0) {
        expected.codes = problem.blank.codes;
      }
      EXPECT_EQ(call.result(), expected) << num_bits;
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

TEST(FakeQuantizeCuda, ACapturedGraphFollowsABinaryWeightThroughAllItsGrids) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const Granularity granularity : {Granularity::kPerTensor, Granularity::kPerChannel}) {
    Problem problem(
        Case{.rows = 33, .cols = 130, .granularity = granularity, .mode = QuantMode::kBinary});
    Call call(problem);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    MOQ_CUDA_CHECK(cudaStreamCreate(&stream));
    MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    call.enqueue(stream);
    MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    for (const int num_bits : {8, 3, 2, 1}) {
      problem.parameters.num_bits = num_bits;
      call.set_num_bits(num_bits);
      MOQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
      MOQ_CUDA_CHECK(cudaStreamSynchronize(stream));
      EXPECT_EQ(call.result(), reference(problem)) << num_bits;
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
}

class FakeQuantizeCudaParts : public ::testing::TestWithParam<Parts> {};

TEST_P(FakeQuantizeCudaParts, OfOneGroupGiveTheBitsOfTheWhole) {
  MOQ_SKIP_WITHOUT_GPU();
  const Problem problem(case_of(GetParam()));
  const Case& c = problem.parameters;
  const DeviceProblem device{problem};
  const std::vector<std::int64_t> ends = ends_of_parts(c.rows);
  std::vector<GroupCollection> collected(ends.size() - 1);
  const Buffer on_device(collected);
  const Buffer num_bits(&c.num_bits, sizeof(int));
  const Buffer step(&c.step, sizeof(std::int64_t));
  const auto call = [&](std::size_t i, const auto& function) {
    FakeQuantizeTensor part = part_of(device.tensor(), ends[i], ends[i + 1]);
    part.collected = on_device.as<GroupCollection>() + i;
    function(FakeQuantizeArgs{.tensors = {&part, 1},
                              .num_bits = num_bits.as<std::int32_t>(),
                              .seed = c.seed,
                              .step = step.as<std::int64_t>()});
  };
  for (int stage = 0; stage < kCollectStages; ++stage) {
    const GroupCollection before = collected[0];
    for (std::size_t i = 0; i < collected.size(); ++i) {
      call(i, [&](const FakeQuantizeArgs& args) { cuda::collect_groups(args, stage, nullptr); });
    }
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    on_device.copy_to(collected);
    combine(collected, before);
    MOQ_CUDA_CHECK(cudaMemcpy(on_device.data(), collected.data(),
                              collected.size() * sizeof(GroupCollection), cudaMemcpyHostToDevice));
  }
  for (std::size_t i = 0; i < collected.size(); ++i) {
    call(i, [](const FakeQuantizeArgs& args) { cuda::fake_quantize(args, nullptr); });
  }
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  EXPECT_EQ(device.result(), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeCudaParts,
                         ::testing::Combine(kSearchShapes, kStorages, kPartsSearches), parts_name);

TEST(FakeQuantizeCuda, HugeMatricesBeyondTwoToThe31ElementsAreReached) {
  MOQ_SKIP_WITHOUT_GPU();
  constexpr std::int64_t kCols = 4099;
  constexpr std::int64_t kRows = (std::int64_t{1} << 31) / kCols + 2;
  constexpr std::size_t kBytes = static_cast<std::size_t>(kRows * kCols) * 2;
  std::size_t available = 0;
  std::size_t total = 0;
  MOQ_CUDA_CHECK(cudaMemGetInfo(&available, &total));
  if (available < 2 * kBytes + (std::size_t{1} << 28)) {
    GTEST_SKIP() << "needs " << 2 * kBytes << " bytes of device memory, has " << available;
  }
  // All weights are zero but those of the last row, which starts beyond element 2^31.
  const Problem last_row(Case{.rows = 1,
                              .cols = kCols,
                              .rounding = Rounding::kStochastic,
                              .input_dtype = DType::kBFloat16,
                              .output_dtype = DType::kBFloat16,
                              .first_element = (kRows - 1) * kCols});
  const Buffer input(kBytes);
  const Buffer output(kBytes);
  constexpr std::size_t kRowBytes = kCols * 2;
  MOQ_CUDA_CHECK(cudaMemset(input.data(), 0, kBytes));
  MOQ_CUDA_CHECK(cudaMemcpy(input.as<std::byte>() + kBytes - kRowBytes, last_row.input.data(),
                            kRowBytes, cudaMemcpyHostToDevice));
  FakeQuantizeTensor tensor =
      last_row.tensor(input.data(), output.data(), nullptr, nullptr, nullptr);
  tensor.rows = kRows;
  tensor.row_stride = kCols;
  tensor.first_element = 0;
  const Buffer num_bits(std::vector<std::int32_t>{8});
  const Buffer step(&last_row.parameters.step, sizeof(std::int64_t));
  cuda::fake_quantize({.tensors = {&tensor, 1},
                       .num_bits = num_bits.as<std::int32_t>(),
                       .seed = last_row.parameters.seed,
                       .step = step.as<std::int64_t>()},
                      nullptr);
  std::vector<std::byte> row(kRowBytes);
  MOQ_CUDA_CHECK(cudaMemcpy(row.data(), output.as<std::byte>() + kBytes - kRowBytes, kRowBytes,
                            cudaMemcpyDeviceToHost));
  std::vector<std::byte> expected = reference(last_row).output;
  expected.resize(kRowBytes);
  EXPECT_EQ(row, expected);
}

TEST(FakeQuantizeCuda, ScalesThatRowsShareWithoutAWorkspaceAreRefused) {
  MOQ_SKIP_WITHOUT_GPU();
  const Problem problem(Case{.rows = 2, .cols = 2, .granularity = Granularity::kPerTensor});
  const DeviceProblem device{problem};
  const FakeQuantizeTensor tensor = device.tensor();
  const Buffer num_bits(std::vector<std::int32_t>{8});
  try {
    cuda::fake_quantize({.tensors = {&tensor, 1}, .num_bits = num_bits.as<std::int32_t>()},
                        nullptr);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "fake_quantize: scales that rows share need a workspace of 392 bytes, got null");
  }
}

}  // namespace
}  // namespace moq::kernels::testing

#endif
