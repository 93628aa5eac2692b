#include "kernels/fake_quantize.h"

#include <gtest/gtest.h>

#include <tuple>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/fake_quantize.h"
#include "tests/cpp/kernels/child.h"
#include "tests/cpp/kernels/fake_quantize_axes.h"
#include "tests/cpp/kernels/fake_quantize_problem.h"
#include "tests/cpp/kernels/isa_axis.h"

namespace moq::kernels::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// One call with one tensor, through the contract.
Result run(const Problem& problem) {
  Result result = problem.blank;
  const Case& c = problem.parameters;
  const FakeQuantizeTensor tensor = problem.tensor(result);
  const std::int32_t num_bits = c.num_bits;
  cpu::fake_quantize({.tensors = {&tensor, 1},
                      .num_bits = &num_bits,
                      .blend_ratio = &c.blend_ratio,
                      .seed = c.seed,
                      .step = &c.step});
  return result;
}

// ---------------------------------------------- every axis, every instruction set, bit for bit

class FakeQuantizeEveryAxis : public ::testing::TestWithParam<Axes> {};

TEST_P(FakeQuantizeEveryAxis, GivesTheBitsOfTheDefinition) {
  const Problem problem(case_of(GetParam()));
  EXPECT_EQ(run(problem), reference(problem));
}

/// What one instruction set gives. Scattered storage is not its own: it is staged to linear first,
/// and rows that share a scale all share one here.
Result run_on_isa(cpu::Isa isa, const Problem& problem, const Result& expected) {
  const Case& c = problem.parameters;
  Result result = problem.blank;
  const FakeQuantizeTensor matrix = problem.tensor(result);
  GridParams shared_grid{};
  cpu::FakeQuantizeStep step{.num_bits = c.num_bits,
                             .blend_ratio = 0.0F,
                             .seed = c.seed,
                             .step = static_cast<std::uint32_t>(c.step),
                             .stream = true,
                             .shared_grid = nullptr};
  if (rows_share_scales(matrix) && num_groups(matrix) > 0) {
    FakeQuantizeTensor along_storage = matrix;
    if (c.storage == Storage::kConv1d) {
      std::swap(along_storage.rows, along_storage.cols);
      std::swap(along_storage.row_stride, along_storage.col_stride);
    }
    const GridSpec spec{c.num_bits, c.mode, c.scale_rule, c.scale_dtype};
    GridSearch search(c.scale_rule == ScaleRule::kGiven
                          ? given_statistics(matrix, 0)
                          : MOQ_FUNCTION_OF(isa, matrix_statistics)(along_storage),
                      spec);
    for (int i = 0; i < num_sweeps(spec); ++i) {
      search.take(i, MOQ_FUNCTION_OF(isa, matrix_sums)(along_storage, search.sweep(i)));
    }
    shared_grid = search.grid();
    step.shared_grid = &shared_grid;
    result.scales = expected.scales;  // written by the caller of these functions
    result.zero_points = expected.zero_points;
  }
  if (c.storage == Storage::kLinear) {
    MOQ_FUNCTION_OF(isa, fake_quantize_rows)(matrix, step);
  } else {
    MOQ_FUNCTION_OF(isa, fake_quantize_columns)(matrix, step);
  }
  return result;
}

template <typename AxesOfOne>
void expect_the_definition(cpu::Isa isa, const AxesOfOne& axes) {
  MOQ_SKIP_WITHOUT_ISA(isa);
  Case c = case_of(axes);
  if (c.granularity == Granularity::kPerRows) {
    c.group_size = 0;
  }
  const Problem problem(c);
  const Result expected = reference(problem);
  EXPECT_EQ(run_on_isa(isa, problem, expected), expected);
}

class FakeQuantizeEveryInstructionSet
    : public ::testing::TestWithParam<std::tuple<cpu::Isa, Axes>> {};

TEST_P(FakeQuantizeEveryInstructionSet, GivesTheBitsOfTheDefinition) {
  const auto& [isa, axes] = GetParam();
  expect_the_definition(isa, axes);
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeEveryAxis,
                         ::testing::Combine(kShapes, kStorages, kGranularities, kModes, kRoundings),
                         axes_name);

const auto kDirectAxes =
    ::testing::Combine(kShapes, ::testing::Values(Storage::kLinear, Storage::kConv1d),
                       kGranularities, kModes, kRoundings);

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeEveryInstructionSet,
                         ::testing::Combine(kIsas, kDirectAxes), [](const auto& info) {
                           return std::string(cpu::name_of(std::get<cpu::Isa>(info.param))) + "_" +
                                  describe(case_of(std::get<Axes>(info.param)));
                         });

class FakeQuantizeEveryInstructionSetSearch
    : public ::testing::TestWithParam<std::tuple<cpu::Isa, Searches>> {};

TEST_P(FakeQuantizeEveryInstructionSetSearch, GivesTheBitsOfTheDefinition) {
  const auto& [isa, axes] = GetParam();
  expect_the_definition(isa, axes);
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeEveryInstructionSetSearch,
                         ::testing::Combine(kIsas,
                                            ::testing::Combine(kSearchShapes,
                                                               ::testing::Values(Storage::kLinear,
                                                                                 Storage::kConv1d),
                                                               kGranularities, kFloats, kSearches)),
                         [](const auto& info) {
                           return std::string(cpu::name_of(std::get<0>(info.param))) + "_" +
                                  describe(case_of(std::get<1>(info.param)));
                         });

class FakeQuantizeEverySearch : public ::testing::TestWithParam<Searches> {};

TEST_P(FakeQuantizeEverySearch, GivesTheBitsOfTheDefinition) {
  const Problem problem(case_of(GetParam()));
  EXPECT_EQ(run(problem), reference(problem));
}

TEST_P(FakeQuantizeEverySearch, BlendsAsTheDefinition) {
  Case c = case_of(GetParam());
  c.blend_ratio = 0.3F;
  const Problem problem(c);
  EXPECT_EQ(run(problem), reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeEverySearch,
                         ::testing::Combine(kSearchShapes, kStorages, kGranularities, kFloats,
                                            kSearches),
                         searches_name);

class FakeQuantizeEveryDType : public ::testing::TestWithParam<DTypes> {};

TEST_P(FakeQuantizeEveryDType, GivesTheBitsOfTheDefinition) {
  const Problem problem(case_of(GetParam()));
  EXPECT_EQ(run(problem), reference(problem));
}

TEST_P(FakeQuantizeEveryDType, BlendsWeightsAndSimulatedValues) {
  Case c = case_of(GetParam());
  c.blend_ratio = 0.3F;
  const Problem problem(c);
  EXPECT_EQ(run(problem), reference(problem));
}

TEST_P(FakeQuantizeEveryDType, WideCodesAreInt16) {
  Case c = case_of(GetParam());
  c.num_bits = 16;
  c.codes_dtype = DType::kInt16;
  const Problem problem(c);
  EXPECT_EQ(run(problem), reference(problem));
}

TEST_P(FakeQuantizeEveryDType, CopiesAtZeroBits) {
  Case c = case_of(GetParam());
  Problem problem(c);
  problem.set(2, 3, kNaN);
  problem.set(2, 4, -kInfinity);
  problem.parameters.num_bits = 0;
  Result expected = problem.blank;
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t col = 0; col < c.cols; ++col) {
      put_float(expected.output, c.output_dtype, problem.place(row, col), problem.get(row, col));
    }
  }
  EXPECT_EQ(run(problem), expected);
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeEveryDType,
                         ::testing::Combine(kFloats, kFloats, kStorages, kRoundings), dtypes_name);

class FakeQuantizeEveryWidth : public ::testing::TestWithParam<int> {};

TEST_P(FakeQuantizeEveryWidth, GivesTheBitsOfTheDefinition) {
  for (const QuantMode mode : {QuantMode::kSymmetric, QuantMode::kAsymmetric}) {
    Case c;
    c.rows = 5;
    c.cols = 131;
    c.mode = mode;
    c.num_bits = GetParam();
    c.codes_dtype = DType::kInt16;
    const Problem problem(c);
    EXPECT_EQ(run(problem), reference(problem));
  }
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeEveryWidth, ::testing::Range(2, kMaxBits + 1));

// -------------------------------------------------------------------------- numbers at the edge

class FakeQuantizeBadGroup : public ::testing::TestWithParam<BadGroup> {};

TEST_P(FakeQuantizeBadGroup, GivesNaNThroughoutAndLeavesTheOthersAlone) {
  for (const float blend_ratio : {0.0F, 0.5F}) {
    const Problem problem = problem_of(GetParam(), blend_ratio);
    EXPECT_EQ(run(problem), reference(problem));
  }
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeBadGroup,
                         ::testing::Combine(kStorages, kGranularities, kAllModes, kNonFinite));

TEST(FakeQuantize, AZeroRowStaysZeroWithTheSmallestScale) {
  Problem problem(Case{.rows = 2, .cols = 19, .scale_dtype = DType::kFloat16});
  for (std::int64_t col = 0; col < 19; ++col) {
    problem.set(1, col, col % 2 == 0 ? 0.0F : -0.0F);
  }
  const Result result = run(problem);
  EXPECT_EQ(result, reference(problem));
  const auto* output = reinterpret_cast<const std::uint32_t*>(result.output.data());
  EXPECT_EQ(output[problem.place(1, 1)], 0U);  // +0, whatever the sign of the weight
}

TEST(FakeQuantize, HugeAndSubnormalWeightsGiveTheBitsOfTheDefinition) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Problem problem(
        Case{.rows = 2, .cols = 33, .mode = QuantMode::kAsymmetric, .scale_dtype = dtype});
    problem.set(0, 5, 3e38F);
    problem.set(0, 6, -3e38F);
    for (std::int64_t col = 0; col < 33; ++col) {
      problem.set(1, col, 1e-41F * static_cast<float>(col));
    }
    EXPECT_EQ(run(problem), reference(problem));
  }
}

// ----------------------------------------------------------------------------- stochastic rounding

TEST(FakeQuantize, StochasticRoundingIsUnbiased) {
  Case c{.rows = 1, .cols = 100000, .rounding = Rounding::kStochastic, .num_bits = 4};
  Problem problem(c);
  double expected = 0.0;
  for (std::int64_t col = 0; col < c.cols; ++col) {
    problem.set(0, col, col == 0 ? 7.0F : 1.3F);
    expected += col == 0 ? 7.0 : 1.3;
  }
  const Result result = run(problem);
  double sum = 0.0;
  for (std::int64_t col = 0; col < c.cols; ++col) {
    float value;
    std::memcpy(&value, result.output.data() + problem.place(0, col) * sizeof(float),
                sizeof(float));
    sum += value;
  }
  const double standard_error = std::sqrt(0.3 * 0.7 * static_cast<double>(c.cols));
  EXPECT_NEAR(sum, expected, 4.0 * standard_error);
}

TEST(FakeQuantize, SumsOfLongGroupsDoNotOverflowTheirHalves) {
  // 32-bit halves of the sums are flushed every 2^15 vectors.
  for (const Storage storage : {Storage::kLinear, Storage::kConv1d}) {
    for (const QuantMode mode : {QuantMode::kBinary, QuantMode::kTernary, QuantMode::kSymmetric}) {
      Case c{.rows = 1, .cols = 700000, .storage = storage, .mode = mode, .num_bits = 2};
      c.scale_rule = mode == QuantMode::kSymmetric ? ScaleRule::kMse : ScaleRule::kExtent;
      c.num_bits = mode == QuantMode::kBinary ? 1 : 2;
      Problem problem(c);
      for (std::int64_t col = 0; col < c.cols; ++col) {
        problem.set(0, col, col % 3 == 0 ? -0.99F : 1.0F);
      }
      EXPECT_EQ(run(problem), reference(problem)) << c;
    }
  }
}

class FakeQuantizeParts : public ::testing::TestWithParam<Parts> {};

TEST_P(FakeQuantizeParts, OfOneGroupGiveTheBitsOfTheWhole) {
  const Problem problem(case_of(GetParam()));
  const Case& c = problem.parameters;
  Result result = problem.blank;
  const FakeQuantizeTensor whole = problem.tensor(result);
  const std::vector<std::int64_t> ends = ends_of_parts(c.rows);
  std::vector<GroupCollection> collected(ends.size() - 1);
  const std::int32_t num_bits = c.num_bits;
  const auto call = [&](std::size_t i, const auto& function) {
    FakeQuantizeTensor part = part_of(whole, ends[i], ends[i + 1]);
    part.collected = &collected[i];
    function(FakeQuantizeArgs{
        .tensors = {&part, 1}, .num_bits = &num_bits, .seed = c.seed, .step = &c.step});
  };
  for (int stage = 0; stage < kCollectStages; ++stage) {
    const GroupCollection before = collected[0];
    for (std::size_t i = 0; i < collected.size(); ++i) {
      call(i, [&](const FakeQuantizeArgs& args) { cpu::collect_groups(args, stage); });
    }
    combine(collected, before);
  }
  for (std::size_t i = 0; i < collected.size(); ++i) {
    call(i, cpu::fake_quantize);
  }
  EXPECT_EQ(result, reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeParts,
                         ::testing::Combine(kSearchShapes, kStorages, kPartsSearches), parts_name);

TEST(FakeQuantize, EveryShardDrawsAsTheWholeParameterDoes) {
  // One scale for all rows of the whole and of the shard: the largest weight is in every column.
  const Case whole{.rows = 12,
                   .cols = 40,
                   .granularity = Granularity::kPerTensor,
                   .rounding = Rounding::kStochastic,
                   .first_element = 0};
  Case shard = whole;
  shard.rows = 5;
  shard.cols = 13;
  shard.first_element = 3 * whole.cols + 11;
  shard.unsharded_cols = whole.cols;
  Problem whole_problem(whole);
  Problem shard_problem(shard);
  for (std::int64_t row = 0; row < whole.rows; ++row) {
    for (std::int64_t col = 0; col < whole.cols; ++col) {
      whole_problem.set(row, col, col == 11 ? 1.0F : 0.3F);
    }
  }
  for (std::int64_t row = 0; row < shard.rows; ++row) {
    for (std::int64_t col = 0; col < shard.cols; ++col) {
      shard_problem.set(row, col, col == 0 ? 1.0F : 0.3F);
    }
  }
  const Result whole_result = run(whole_problem);
  const Result shard_result = run(shard_problem);
  for (std::int64_t row = 0; row < shard.rows; ++row) {
    for (std::int64_t col = 0; col < shard.cols; ++col) {
      EXPECT_EQ(shard_result.codes[static_cast<std::size_t>(row * shard.cols + col)],
                whole_result.codes[static_cast<std::size_t>((row + 3) * whole.cols + col + 11)]);
    }
  }
}

TEST(FakeQuantize, ElementNumbersBeyond32BitsDrawTheirOwnBits) {
  Case c{
      .rows = 3, .cols = 29, .rounding = Rounding::kStochastic, .first_element = (1LL << 35) - 40};
  const Problem problem(c);
  EXPECT_EQ(run(problem), reference(problem));
}

/// Rows long enough for the loop that draws words where it uses them, which takes a row's elements
/// from one whose word is the first of a block and whose output accepts a streaming store; whatever
/// lies before and behind them is drawn first.
using DrawnRows = std::tuple<DType, bool, std::int64_t, std::int64_t>;

class FakeQuantizeDrawnRows : public ::testing::TestWithParam<std::tuple<cpu::Isa, DrawnRows>> {};

std::string drawn_rows_name(const ::testing::TestParamInfo<std::tuple<cpu::Isa, DrawnRows>>& info) {
  const auto& [isa, rows] = info.param;
  const auto& [dtype, stream, cols, first_element] = rows;
  return std::string(cpu::name_of(isa)) + "_" + moq::name_of(dtype) +
         (stream ? "_streamed_" : "_") + std::to_string(cols) + "_from_" +
         std::to_string(first_element);
}

TEST_P(FakeQuantizeDrawnRows, DrawTheBitsOfTheDefinition) {
  const auto& [isa, rows] = GetParam();
  const auto& [dtype, stream, cols, first_element] = rows;
  MOQ_SKIP_WITHOUT_ISA(isa);
  const Problem problem(Case{.rows = 2,
                             .cols = cols,
                             .rounding = Rounding::kStochastic,
                             .input_dtype = dtype,
                             .output_dtype = dtype,
                             .first_element = first_element,
                             .unsharded_cols = 1024});
  const Case& c = problem.parameters;
  const Result expected = reference(problem);
  for (std::size_t misplaced = 0; misplaced < 5; ++misplaced) {
    Result result = problem.blank;
    std::vector<std::byte> memory(result.output.size() + 128);
    const std::size_t past_line = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
    std::byte* output = memory.data() + (64 - past_line) + misplaced * size_of(dtype);
    std::ranges::copy(result.output, output);
    MOQ_FUNCTION_OF(isa, fake_quantize_rows)
    (problem.tensor(problem.input.data(), output, nullptr, result.scales.data(),
                    result.zero_points.data()),
     {.num_bits = c.num_bits,
      .blend_ratio = 0.0F,
      .seed = c.seed,
      .step = static_cast<std::uint32_t>(c.step),
      .stream = stream,
      .shared_grid = nullptr});
    std::copy_n(output, result.output.size(), result.output.data());
    EXPECT_EQ(result.output, expected.output) << misplaced << " elements behind a line";
    EXPECT_EQ(result.scales, expected.scales);
  }
}

// Lengths around what is drawn at a time (4, 32 and 128 elements), numbers on and off a block's
// first, and blocks that pass 2^32.
INSTANTIATE_TEST_SUITE_P(
    All, FakeQuantizeDrawnRows,
    ::testing::Combine(
        kIsas, ::testing::Combine(kFloats, ::testing::Bool(),
                                  ::testing::Values(3, 127, 128, 129, 160, 255, 256, 400, 1021),
                                  ::testing::Values(0, 1, 12, (1LL << 34) - 500, 1LL << 34))),
    drawn_rows_name);

// ---------------------------------------------------------------------------------- the whole call

TEST(FakeQuantize, ManyTensorsOnSeveralThreadsEqualEachAlone) {
  std::vector<Problem> problems;
  for (const Storage storage : {Storage::kLinear, Storage::kConv1d, Storage::kScattered}) {
    for (const Granularity granularity : {Granularity::kPerTensor, Granularity::kPerChannel,
                                          Granularity::kPerGroup, Granularity::kPerRows}) {
      problems.emplace_back(Case{.rows = 1032,
                                 .cols = 144,
                                 .storage = storage,
                                 .granularity = granularity,
                                 .mode = granularity == Granularity::kPerRows
                                             ? QuantMode::kTernary
                                             : QuantMode::kSymmetric,
                                 .group_size = granularity == Granularity::kPerRows ? 258 : 48,
                                 .num_bits = granularity == Granularity::kPerGroup  ? 4
                                             : granularity == Granularity::kPerRows ? 2
                                                                                    : 8});
    }
  }
  std::vector<Result> results;
  for (const Problem& problem : problems) results.push_back(problem.blank);
  std::vector<FakeQuantizeTensor> tensors;
  std::vector<std::int32_t> num_bits;
  for (std::size_t i = 0; i < problems.size(); ++i) {
    tensors.push_back(problems[i].tensor(results[i]));
    num_bits.push_back(problems[i].parameters.num_bits);
  }
  const ThreadScope threads(4);
  cpu::fake_quantize({.tensors = tensors, .num_bits = num_bits.data()});
  for (std::size_t i = 0; i < problems.size(); ++i) {
    EXPECT_EQ(results[i], run(problems[i])) << problems[i].parameters;
  }
}

TEST(FakeQuantize, OneUnitOfWorkWakesNoOtherThread) {
  const Problem small(Case{.rows = 8, .cols = 8});
  const Problem large(Case{.rows = 1201, .cols = 2003});
  const ThreadScope threads(2);
  EXPECT_EQ(
      status_of_child([&] { return run(small) == reference(small) && num_threads_alive() == 1; }),
      0);
  EXPECT_EQ(
      status_of_child([&] { return run(large) == reference(large) && num_threads_alive() == 2; }),
      0);
}

TEST(FakeQuantize, OutputsLargerThanTheCachesEqualTheDefinition) {
  const Problem problem(Case{.rows = 1201, .cols = 2003, .storage = Storage::kLinear});
  EXPECT_EQ(run(problem), reference(problem));
}

class FakeQuantizeInPlace : public ::testing::TestWithParam<InPlace> {};

TEST_P(FakeQuantizeInPlace, GivesTheBitsOfTheDefinition) {
  const Problem problem = problem_of(GetParam());
  Result result = problem.blank;
  FakeQuantizeTensor tensor = problem.tensor(result);
  tensor.input = tensor.output;
  const std::int32_t num_bits = problem.parameters.num_bits;
  cpu::fake_quantize({.tensors = {&tensor, 1}, .num_bits = &num_bits});
  EXPECT_EQ(result, reference(problem));
}

INSTANTIATE_TEST_SUITE_P(All, FakeQuantizeInPlace,
                         ::testing::Combine(kStorages, kGranularities, kFloats), in_place_name);

TEST(FakeQuantize, ASkippedStepWritesNothing) {
  const Problem problem(Case{.rows = 4, .cols = 4});
  Result result = problem.blank;
  const FakeQuantizeTensor tensor = problem.tensor(result);
  const std::int32_t num_bits = 8;
  const float skip = 1.0F;
  cpu::fake_quantize({.tensors = {&tensor, 1}, .num_bits = &num_bits, .skip = &skip});
  EXPECT_EQ(result, problem.blank);
}

TEST(FakeQuantize, NullOutputsAreNotWritten) {
  const Problem problem(Case{.rows = 9, .cols = 21});
  Result result = problem.blank;
  const FakeQuantizeTensor tensor =
      problem.tensor(problem.input.data(), nullptr, nullptr, result.scales.data(), nullptr);
  const std::int32_t num_bits = 8;
  cpu::fake_quantize({.tensors = {&tensor, 1}, .num_bits = &num_bits});
  EXPECT_EQ(result.scales, reference(problem).scales);
  EXPECT_EQ(result.output, problem.blank.output);
}

// ------------------------------------------------------------------------------------------ errors

/// The message of the error that a call with a changed tensor raises.
template <typename Change>
std::string error_of(const Change& change, std::int32_t num_bits = 8, float blend_ratio = 0.0F) {
  const Problem problem(Case{.rows = 4, .cols = 12});
  Result result = problem.blank;
  FakeQuantizeTensor tensor = problem.tensor(result);
  change(tensor);
  try {
    cpu::fake_quantize(
        {.tensors = {&tensor, 1}, .num_bits = &num_bits, .blend_ratio = &blend_ratio});
  } catch (const Error& error) {
    EXPECT_EQ(result, problem.blank) << "a refused call wrote something";
    return error.what();
  }
  return "no error";
}

constexpr auto kUnchanged = [](FakeQuantizeTensor&) {};

TEST(FakeQuantize, RefusesABitWidthWithoutAGrid) {
  EXPECT_EQ(error_of(kUnchanged, 1),
            "fake_quantize: num_bits of tensor 0 must be 0 or in [2, 16], got 1");
  EXPECT_EQ(error_of(kUnchanged, 17),
            "fake_quantize: num_bits of tensor 0 must be 0 or in [2, 16], got 17");
}

TEST(FakeQuantize, RefusesCodesTooNarrowForTheirWidth) {
  EXPECT_EQ(error_of(kUnchanged, 9),
            "fake_quantize: int8 codes of tensor 0 need num_bits <= 8, got 9");
}

TEST(FakeQuantize, RefusesABlendRatioOutsideTheUnitInterval) {
  EXPECT_EQ(error_of(kUnchanged, 8, 1.5F),
            "fake_quantize: blend_ratio of tensor 0 must be in [0, 1], got 1.5");
  EXPECT_EQ(error_of(kUnchanged, 8, kNaN),
            "fake_quantize: blend_ratio of tensor 0 must be in [0, 1], got nan");
}

TEST(FakeQuantize, RefusesAGroupSizeThatDoesNotDivideTheColumns) {
  const auto change = [](FakeQuantizeTensor& tensor) {
    tensor.granularity = Granularity::kPerGroup;
    tensor.group_size = 5;
  };
  EXPECT_EQ(error_of(change),
            "fake_quantize: group_size of tensor 0 must divide its columns, got 5 and 12");
}

TEST(FakeQuantize, RefusesIntegerWeights) {
  EXPECT_EQ(error_of([](FakeQuantizeTensor& tensor) { tensor.input_dtype = DType::kInt8; }),
            "fake_quantize: input, output and scale of tensor 0 must be float32, float16 or "
            "bfloat16, got int8, float32 and float32");
}

TEST(FakeQuantize, RefusesInPlaceBetweenDTypes) {
  const auto change = [](FakeQuantizeTensor& tensor) {
    tensor.output = const_cast<void*>(tensor.input);
    tensor.output_dtype = DType::kBFloat16;
  };
  EXPECT_EQ(error_of(change),
            "fake_quantize: tensor 0 can only be its own output in its own dtype, got float32 and "
            "bfloat16");
}

}  // namespace
}  // namespace moq::kernels::testing
