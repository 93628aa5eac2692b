// A decode step in one kernel against its definition in float64, and against the kernels of one
// projection each, whose error it must not exceed by a factor of two.
#include <gtest/gtest.h>

#include "tests/cpp/kernels/device.h"

#if defined(MOQ_WITH_CUDA)

#include <functional>
#include <limits>
#include <numeric>

#include "kernels/common/check.h"
#include "tests/cpp/kernels/decode_step_problem.h"

namespace moq::kernels::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Ends a test as skipped on a GPU that such a step is not computed on.
#define MOQ_SKIP_UNSUPPORTED(SHAPE)                                          \
  MOQ_SKIP_WITHOUT_GPU();                                                    \
  if (!cuda::decode_step_supports(SHAPE)) {                                  \
    GTEST_SKIP() << "this GPU does not compute a decode step in one kernel"; \
  }

DecodeStepShape shape_of(std::int64_t heads, std::int64_t layers, DType dtype = DType::kFloat16) {
  return {.num_layers = layers,
          .hidden_size = 64 * heads,
          .num_heads = heads,
          .head_dim = 64,
          .intermediate_size = 256 * heads,
          .dtype = dtype};
}

template <typename Values>
double rms_error(const Values& values, const Numbers& expected) {
  double sum = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = values[i] - expected[i];
    sum += difference * difference;
  }
  return std::sqrt(sum / static_cast<double>(expected.size()));
}

struct Case {
  std::int64_t heads;
  std::int64_t layers;
  std::int32_t past;
  DType dtype = DType::kFloat16;
};

std::ostream& operator<<(std::ostream& os, const Case& c) {
  return os << c.heads << " heads, " << c.layers << " layers, past " << c.past << ", "
            << name_of(c.dtype);
}

class DecodeStepTest : public ::testing::TestWithParam<Case> {};

TEST_P(DecodeStepTest, ComputesItsDefinition) {
  const auto& [heads, layers, past, dtype] = GetParam();
  MOQ_SKIP_UNSUPPORTED(shape_of(heads, layers, dtype));
  StepProblem problem(heads, layers, past, dtype);
  const auto [x, appended] = problem.define();
  const StepResult step = problem.run();
  const StepResult chain = problem.run_chain();
  EXPECT_LE(rms_error(step.output, x), 2 * rms_error(chain.output, x));
  EXPECT_LE(rms_error(problem.appended(step.cache), appended),
            2 * rms_error(problem.appended(chain.cache), appended));
  std::vector<float> rest = step.cache;
  std::vector<float> before = problem.cache();
  problem.forget_appended(rest);
  problem.forget_appended(before);
  EXPECT_EQ(rest, before);
}

INSTANTIATE_TEST_SUITE_P(Shapes, DecodeStepTest,
                         ::testing::Values(Case{1, 1, 0}, Case{1, 3, 1}, Case{2, 2, 5},
                                           Case{3, 1, 63}, Case{4, 2, 64, DType::kBFloat16},
                                           Case{7, 1, 65}, Case{9, 1, 100},
                                           Case{12, 2, 511, DType::kBFloat16}, Case{13, 1, 127},
                                           Case{16, 1, 1023}, Case{20, 1, 600}, Case{23, 1, 319},
                                           Case{25, 2, 512}, Case{25, 1, 1023, DType::kBFloat16},
                                           Case{26, 1, 320}));
// Steps that are not multiples of the exchange's slots, and more keys than a stage holds.
INSTANTIATE_TEST_SUITE_P(Depths, DecodeStepTest,
                         ::testing::Values(Case{1, 4, 3}, Case{1, 7, 2}, Case{2, 8, 1},
                                           Case{1, 9, 0}, Case{1, 1, 519}, Case{1, 1, 521},
                                           Case{1, 1, 3000}, Case{2, 17, 70}));

TEST(DecodeStepRepeatTest, EveryLaunchGivesTheSameBits) {
  for (const std::int64_t layers : {1, 3, 6}) {
    MOQ_SKIP_UNSUPPORTED(shape_of(25, layers));
    StepProblem problem(25, layers, 512);
    const StepResult first = problem.run();
    const DecodeStepArgs args = problem.args();
    for (int i = 0; i < 60; ++i) {
      cuda::decode_step(args, nullptr);
      if (i % 10 == 9) {
        ASSERT_EQ(problem.read().output, first.output) << "launch " << i;
      }
    }
    EXPECT_EQ(problem.read().cache, first.cache);
  }
}

TEST(DecodeStepRepeatTest, ACapturedStepGivesTheSameBits) {
  MOQ_SKIP_UNSUPPORTED(shape_of(25, 5));
  StepProblem problem(25, 5, 700);
  const StepResult first = problem.run();
  const DecodeStepArgs args = problem.args();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  MOQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::decode_step(args, stream);
  cuda::decode_step(args, stream);
  MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (int i = 0; i < 100; ++i) {
    MOQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
  }
  EXPECT_EQ(problem.read().output, first.output);
  MOQ_CUDA_CHECK(cudaGraphExecDestroy(executable));
  MOQ_CUDA_CHECK(cudaGraphDestroy(graph));
  MOQ_CUDA_CHECK(cudaStreamDestroy(stream));
}

TEST(DecodeStepRepeatTest, DecodersOnTwoStreamsDontDisturbEachOther) {
  MOQ_SKIP_UNSUPPORTED(shape_of(25, 3));
  StepProblem wide(25, 3, 300);
  StepProblem narrow(2, 5, 40);
  const StepResult of_wide = wide.run();
  const StepResult of_narrow = narrow.run();
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) {
    MOQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  const DecodeStepArgs args[2] = {wide.args(), narrow.args()};
  for (int i = 0; i < 200; ++i) {
    cuda::decode_step(args[i % 2], streams[i % 2]);
  }
  EXPECT_EQ(wide.read().output, of_wide.output);
  EXPECT_EQ(narrow.read().output, of_narrow.output);
  for (cudaStream_t stream : streams) {
    MOQ_CUDA_CHECK(cudaStreamDestroy(stream));
  }
}

TEST(DecodeStepValueTest, ATokenWithoutARowIsNotAppended) {
  MOQ_SKIP_UNSUPPORTED(shape_of(2, 2));
  StepProblem problem(2, 2, 10);
  const std::vector<float> output = problem.run().output;
  problem.cache_row() = -1;
  const StepResult result = problem.run();
  EXPECT_EQ(result.output, output);
  EXPECT_EQ(result.cache, problem.cache());
}

TEST(DecodeStepValueTest, WhatIsNoNumberMakesAllOfXNoneAndTheNextStepIsRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(3, 3));
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    StepProblem problem(3, 3, 130, dtype);
    const std::vector<float> expected = problem.run().output;
    const auto expect_nan = [&](float& number, float value, const char* what) {
      const float before = std::exchange(number, value);
      const std::vector<float> output = problem.run().output;
      EXPECT_TRUE(std::all_of(output.begin(), output.end(), [](float x) { return x != x; }))
          << what;
      number = before;
      EXPECT_EQ(problem.run().output, expected) << "behind " << what;
    };
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    expect_nan(problem.input()[5], kNan, "a NaN in the input");
    expect_nan(problem.input()[5], -kNan, "a negative NaN in the input");
    expect_nan(problem.input()[190], kInfinity, "an infinity in the input");
    expect_nan(problem.cache()[problem.place(0, 1, 77) + 3], kNan, "a NaN in a key");
    expect_nan(problem.cache()[problem.place(3, 2, 0)], kNan, "a NaN in a value");
  }
}

/// The NaN that stands for a word that is not there.
TEST(DecodeStepValueTest, NumbersOfAllOnesDontStopAStep) {
  MOQ_SKIP_UNSUPPORTED(shape_of(2, 2));
  StepProblem problem(2, 2, 10);
  const std::vector<float> expected = problem.run().output;
  const DecodeStepArgs args = problem.args();
  const std::size_t bytes = problem.input().size() * 2;
  MOQ_CUDA_CHECK(cudaMemset(const_cast<void*>(args.input), 0xff, bytes));
  cuda::decode_step(args, nullptr);
  for (const float x : problem.read().output) {
    EXPECT_TRUE(x != x);
  }
  EXPECT_EQ(problem.run().output, expected);
}

TEST(DecodeStepSupportTest, KnowsWhatItDoesNotCompute) {
  MOQ_SKIP_UNSUPPORTED(shape_of(25, 48));
  const auto refuses = [](const std::function<void(DecodeStepShape&)>& change) {
    DecodeStepShape shape = shape_of(12, 12);
    EXPECT_TRUE(cuda::decode_step_supports(shape));
    change(shape);
    EXPECT_FALSE(cuda::decode_step_supports(shape));
    EXPECT_THROW(cuda::decode_step_state_size(shape), Error);
  };
  refuses([](DecodeStepShape& shape) { shape.num_layers = 0; });
  refuses([](DecodeStepShape& shape) { shape.num_layers = -1; });
  refuses([](DecodeStepShape& shape) { shape = shape_of(0, 1); });
  refuses([](DecodeStepShape& shape) { shape = shape_of(27, 1); });
  refuses([](DecodeStepShape& shape) { shape.head_dim = 32; });
  refuses([](DecodeStepShape& shape) { shape.hidden_size += 64; });
  refuses([](DecodeStepShape& shape) { shape.intermediate_size /= 2; });
  refuses([](DecodeStepShape& shape) { shape.dtype = DType::kFloat32; });
  refuses([](DecodeStepShape& shape) { shape.dtype = DType::kInt8; });
}

TEST(DecodeStepSupportTest, KnowsWhichLayersItDoesNotCompute) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  const StepProblem problem(1, 1, 1);
  const auto refuses = [&](const std::function<void(DecodeStepLayer&)>& change) {
    DecodeStepLayer layer = problem.layers()[0];
    EXPECT_TRUE(cuda::decode_step_supports(problem.shape(), layer));
    change(layer);
    EXPECT_FALSE(cuda::decode_step_supports(problem.shape(), layer));
    const Buffer state(cuda::decode_step_state_size(problem.shape()));
    EXPECT_THROW(cuda::prepare_decode_step(problem.shape(), {&layer, 1}, state.data(), nullptr),
                 Error);
  };
  refuses([](DecodeStepLayer& layer) { layer.attention_norm.kind = NormKind::kRmsNorm; });
  refuses([](DecodeStepLayer& layer) { layer.ffn_norm.kind = NormKind::kNone; });
  refuses([](DecodeStepLayer& layer) { layer.ffn_norm.epsilon *= 2; });
  refuses([](DecodeStepLayer& layer) { layer.qkv.shape.group_size = 32; });
  refuses([](DecodeStepLayer& layer) { layer.up.shape.asymmetric = true; });
  refuses([](DecodeStepLayer& layer) { layer.up.shape.format = WeightFormat::kInt4; });
  refuses([](DecodeStepLayer& layer) { layer.down.shape.n += 16; });
}

TEST(DecodeStepSupportTest, BadArgumentsAreErrors) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  StepProblem problem(1, 1, 1);
  const auto refuses = [&](const std::function<void(DecodeStepArgs&)>& change) {
    DecodeStepArgs args = problem.args();
    change(args);
    EXPECT_THROW(cuda::decode_step(args, nullptr), Error);
  };
  refuses([](DecodeStepArgs& args) { args.shape.num_heads = 2; });
  refuses([](DecodeStepArgs& args) { args.state = nullptr; });
  refuses([](DecodeStepArgs& args) { args.state = static_cast<char*>(args.state) + 64; });
  refuses([](DecodeStepArgs& args) { args.input = nullptr; });
  refuses([](DecodeStepArgs& args) { args.input = static_cast<const char*>(args.input) + 2; });
  refuses([](DecodeStepArgs& args) { args.input = args.output; });
  refuses([](DecodeStepArgs& args) { args.output = nullptr; });
  refuses([](DecodeStepArgs& args) { args.pages.values = nullptr; });
  refuses([](DecodeStepArgs& args) { args.pages.dtype = DType::kInt8; });
  refuses([](DecodeStepArgs& args) { args.layer_stride += 1; });
  refuses([](DecodeStepArgs& args) { args.page_table = nullptr; });
  refuses([](DecodeStepArgs& args) { args.sequence = nullptr; });
  refuses([](DecodeStepArgs& args) { args.cache_row = nullptr; });
  std::vector<DecodeStepLayer> layers = problem.layers();
  const auto prepare = [&](std::span<const DecodeStepLayer> some, void* state) {
    cuda::prepare_decode_step(problem.shape(), some, state, nullptr);
  };
  void* const state = problem.args().state;
  EXPECT_THROW(prepare({}, state), Error);
  EXPECT_THROW(prepare(layers, nullptr), Error);
  layers[0].down.data = nullptr;
  EXPECT_THROW(prepare(layers, state), Error);
  layers = problem.layers();
  layers[0].ffn_norm.weight = nullptr;
  EXPECT_THROW(prepare(layers, state), Error);
}

}  // namespace
}  // namespace moq::kernels::testing

#endif
