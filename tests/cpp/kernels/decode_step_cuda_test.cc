// A decode step in one kernel against its definition in float64, and against the kernels of one
// projection each, whose error it must not exceed by a factor of two.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>

#include "kernels/common/check.h"
#include "tests/cpp/kernels/decode_step_problem.h"
#include "tests/cpp/kernels/device.h"

namespace moq::kernels::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

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
                                           Case{26, 1, 320}, Case{26, 2, 0}));
// Steps that are not multiples of the exchange's slots, and more keys than a stage holds.
INSTANTIATE_TEST_SUITE_P(Depths, DecodeStepTest,
                         ::testing::Values(Case{1, 4, 3}, Case{1, 7, 2}, Case{2, 8, 1},
                                           Case{1, 9, 0}, Case{1, 1, 519}, Case{1, 1, 521},
                                           Case{1, 1, 3000}, Case{2, 17, 70}, Case{1, 128, 3}));
// A thread block's keys in more pages than it keeps at hand.
INSTANTIATE_TEST_SUITE_P(ManyPages, DecodeStepTest, ::testing::Values(Case{1, 1, 21000}));

TEST(DecodeStepRepeatTest, EveryLaunchGivesTheSameBits) {
  for (const std::int64_t layers : {1, 3, 6}) {
    MOQ_SKIP_UNSUPPORTED(shape_of(25, layers));
    StepProblem problem(25, layers, 512);
    const StepResult first = problem.run();
    const DecodeStepArgs args = problem.args();
    const int launches = repeats(60);
    for (int i = 1; i <= launches; ++i) {
      cuda::decode_step(args, nullptr);
      if (i % 10 == 0 || i == launches) {
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
  for (int i = 0; i < repeats(100); ++i) {
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
  for (int i = 0; i < std::max(repeats(200), 2); ++i) {
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

/// What must hold, and what was given instead.
void expect_refused(const std::function<void()>& call, const std::string& what) {
  try {
    call();
    ADD_FAILURE() << "accepted: " << what;
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(what), std::string::npos) << message;
    EXPECT_NE(message.find(", got "), std::string::npos) << message;
  }
}

TEST(DecodeStepSupportTest, BadArgumentsAreErrors) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  StepProblem problem(1, 1, 1);
  const auto refuses = [&](const std::string& what,
                           const std::function<void(DecodeStepArgs&)>& change) {
    DecodeStepArgs args = problem.args();
    change(args);
    expect_refused([&] { cuda::decode_step(args, nullptr); }, what);
  };
  const auto moved = [](const void* pointer, int bytes) {
    return static_cast<char*>(const_cast<void*>(pointer)) + bytes;
  };
  refuses("the shape", [](DecodeStepArgs& args) { args.shape.num_heads = 2; });
  refuses("state", [](DecodeStepArgs& args) { args.state = nullptr; });
  refuses("state", [&](DecodeStepArgs& args) { args.state = moved(args.state, 64); });
  refuses("input", [](DecodeStepArgs& args) { args.input = nullptr; });
  refuses("input", [&](DecodeStepArgs& args) { args.input = moved(args.input, 2); });
  refuses("output", [](DecodeStepArgs& args) { args.output = nullptr; });
  refuses("output", [&](DecodeStepArgs& args) { args.output = moved(args.output, 1); });
  refuses("pages.keys", [](DecodeStepArgs& args) { args.pages.keys = nullptr; });
  refuses("pages.values", [](DecodeStepArgs& args) { args.pages.values = nullptr; });
  refuses("pages.values",
          [&](DecodeStepArgs& args) { args.pages.values = moved(args.pages.values, 8); });
  refuses("pages must be of", [](DecodeStepArgs& args) { args.pages.dtype = DType::kInt8; });
  refuses("layer_stride", [](DecodeStepArgs& args) { args.layer_stride += 1; });
  refuses("page_table", [](DecodeStepArgs& args) { args.page_table = nullptr; });
  refuses("sequence", [](DecodeStepArgs& args) { args.sequence = nullptr; });
  refuses("cache_row", [](DecodeStepArgs& args) { args.cache_row = nullptr; });
}

TEST(DecodeStepSupportTest, OverlappingMemoryIsAnError) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  StepProblem problem(1, 1, 1);
  const Buffer rows(std::vector<std::uint16_t>(4 * 64));
  const auto step = [&](int input, int output) {
    DecodeStepArgs args = problem.args();
    args.input = rows.as<char>() + input;
    args.output = rows.as<char>() + output;
    cuda::decode_step(args, nullptr);
  };
  for (const int distance : {0, 4, 64, 124, -4, -126}) {
    expect_refused([&] { step(128, 128 + distance); }, "output must not overlap input");
  }
  step(128, 256);
  step(128, 0);
  DecodeStepArgs args = problem.args();
  const auto bytes = static_cast<std::ptrdiff_t>(cuda::decode_step_state_size(problem.shape()));
  for (const std::ptrdiff_t at : {std::ptrdiff_t{-124}, std::ptrdiff_t{256}, bytes - 4}) {
    args = problem.args();
    args.output = static_cast<char*>(args.state) + at;
    expect_refused([&] { cuda::decode_step(args, nullptr); }, "output must not overlap state");
    args = problem.args();
    args.input = static_cast<char*>(args.state) + at;
    expect_refused([&] { cuda::decode_step(args, nullptr); }, "input must not overlap state");
  }
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
}

TEST(DecodeStepSupportTest, BadLayersAreErrors) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  StepProblem problem(1, 1, 1);
  void* const state = problem.args().state;
  const auto prepare = [&](std::span<const DecodeStepLayer> layers, void* to) {
    return
        [&problem, layers, to] { cuda::prepare_decode_step(problem.shape(), layers, to, nullptr); };
  };
  const auto refuses = [&](const std::string& what,
                           const std::function<void(DecodeStepLayer&)>& change) {
    std::vector<DecodeStepLayer> layers = problem.layers();
    change(layers[0]);
    expect_refused(prepare(layers, state), what);
  };
  const std::vector<DecodeStepLayer> layers = problem.layers();
  expect_refused(prepare({}, state), "there must be 1 layers");
  expect_refused(prepare(layers, nullptr), "state must be aligned");
  refuses("weights must be aligned", [](DecodeStepLayer& layer) { layer.down.data = nullptr; });
  refuses("norms must have weights",
          [](DecodeStepLayer& layer) { layer.ffn_norm.weight = nullptr; });
  refuses("got an RMSNorm",
          [](DecodeStepLayer& layer) { layer.ffn_norm.kind = NormKind::kRmsNorm; });
  refuses("got a LayerNorm with epsilon 0.5",
          [](DecodeStepLayer& layer) { layer.attention_norm.epsilon = 0.5F; });
  refuses("got up of 256 x 64 in int4",
          [](DecodeStepLayer& layer) { layer.up.shape.format = WeightFormat::kInt4; });
  refuses("a scale for 32 columns",
          [](DecodeStepLayer& layer) { layer.down.shape.group_size = 32; });
}

}  // namespace
}  // namespace moq::kernels::testing
