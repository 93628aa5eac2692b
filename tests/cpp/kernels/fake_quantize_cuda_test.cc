// The CUDA body of fake_quantize against the definition, bit for bit, over the same axes as the
// CPU's.
#include <gtest/gtest.h>

#include <cstddef>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/fake_quantize.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/fake_quantize_axes.h"
#include "tests/cpp/kernels/fake_quantize_on_gpu.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

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
  EXPECT_EQ(error_of([&] {
              cuda::fake_quantize(
                  {.tensors = {&tensor, 1}, .num_bits = num_bits.as<std::int32_t>()}, nullptr);
            }),
            "fake_quantize: scales that rows share need a workspace of 392 bytes, got null");
}

}  // namespace
}  // namespace moq::kernels::testing
