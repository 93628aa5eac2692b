// A decode step in one kernel: rows that are hard to normalise, what a layer may have, and steps
// that follow each other, fail, or move to another stream.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>

#include "kernels/common/check.h"
#include "tests/cpp/kernels/decode_step_problem.h"
#include "tests/cpp/kernels/device.h"

namespace moq::kernels::testing {
namespace {

/// A step errs as little as twice the chain of kernels, in x and in the new token's keys and
/// values; returns what it left.
StepResult expect_right(StepProblem& problem, const std::string& what) {
  const auto [x, appended] = problem.define();
  StepResult step = problem.run();
  const StepResult chain = problem.run_chain();
  EXPECT_LE(rms_error(step.output, x), 2 * rms_error(chain.output, x)) << what;
  EXPECT_LE(rms_error(problem.appended(step.cache), appended),
            2 * rms_error(problem.appended(chain.cache), appended))
      << what;
  return step;
}

// ---- Norms. Decoders of 1 and 2 heads have fewer blocks of columns than a thread block has warps.

class DecodeStepRowTest : public ::testing::TestWithParam<std::tuple<int, DType>> {
 protected:
  /// Checks a step whose input is number(column).
  void check(const std::string& what, const std::function<float(std::size_t)>& number) {
    const auto& [heads, dtype] = GetParam();
    std::vector<float> input(static_cast<std::size_t>(64 * heads));
    for (std::size_t i = 0; i < input.size(); ++i) {
      input[i] = number(i);
    }
    input = from_bytes(to_bytes(input, dtype), dtype);
    // A single layer's keys show its first norm alone; others read what x has been rounded to.
    for (const int layers : {1, 3}) {
      std::unique_ptr<StepProblem>& problem = problems_[layers];
      if (problem == nullptr) {
        problem = std::make_unique<StepProblem>(heads, layers, 70, dtype);
      }
      problem->input() = input;
      expect_right(*problem, what + ", layers: " + std::to_string(layers));
    }
  }

 private:
  std::map<int, std::unique_ptr<StepProblem>> problems_;  ///< by number of layers
};

TEST_P(DecodeStepRowTest, ConstantOnesAreRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  for (const float number : {0.0F, 0.3F, 100.3F, -777.0F, 3001.0F}) {
    check("constant " + std::to_string(number), [&](std::size_t) { return number; });
  }
}

TEST_P(DecodeStepRowTest, OnesFarFromZeroAreRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  for (const auto& [mean, deviation] :
       {std::pair{100.0F, 0.1F}, {-100.0F, 1.0F}, {1000.0F, 2.0F}, {-3000.0F, 10.0F}}) {
    std::mt19937 generator(3);
    std::normal_distribution<float> number(mean, deviation);
    check("mean " + std::to_string(mean), [&](std::size_t) { return number(generator); });
  }
}

/// Outliers at columns from which warps take differences, and elsewhere.
TEST_P(DecodeStepRowTest, OnesWithAnOutlierAreRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  for (const std::size_t place : {0, 1, 32, 63}) {
    std::mt19937 generator(4);
    std::normal_distribution<float> number(0.2F, 1.0F);
    check("outlier at " + std::to_string(place), [&](std::size_t column) {
      const float usual = number(generator);
      return column == place ? 30000.0F : usual;
    });
  }
}

/// Each warp's columns have a mean of their own, far from the others'.
TEST_P(DecodeStepRowTest, OnesOfDistantPartsAreRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  std::mt19937 generator(5);
  std::normal_distribution<float> number(0.0F, 0.5F);
  check("distant parts", [&](std::size_t column) {
    return 200.0F * static_cast<float>(column / 32 % 5) + number(generator);
  });
}

INSTANTIATE_TEST_SUITE_P(All, DecodeStepRowTest,
                         ::testing::Combine(::testing::Values(1, 2, 4, 20),
                                            ::testing::Values(DType::kFloat16, DType::kBFloat16)));

// ---- What a layer may have.

TEST(DecodeStepLayerTest, EveryActivationIsRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(2, 2));
  for (const Activation activation :
       {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
        Activation::kQuickGelu, Activation::kSilu, Activation::kTanh}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      StepProblem problem(2, 2, 20, dtype);
      problem.set_activation(activation);
      expect_right(problem, name_of(activation));
    }
  }
}

TEST(DecodeStepLayerTest, LayersWithoutBiasesAreRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(3, 2));
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    StepProblem problem(3, 2, 20, dtype);
    const std::vector<float> with_biases = problem.run().output;
    StepProblem without(3, 2, 20, dtype);
    without.drop_biases();
    EXPECT_NE(expect_right(without, "no biases").output, with_biases);
  }
}

// ---- Steps behind each other.

/// 3 layers: steps begin with every one of the exchange's slots.
class DecodeStepSequenceTest : public ::testing::Test {
 protected:
  static constexpr std::int32_t kLast = 193;  // the second token of the fourth page
  /// Behind so many tokens the steps begin: from an empty cache on, or where they are fewer under
  /// racecheck, shortly before a page's end.
  const std::int32_t first_ = kLast + 1 - std::max(repeats(kLast + 1), 3);

  /// Outputs of steps of a growing cache, each behind the one before.
  std::vector<std::vector<float>> one_by_one(StepProblem& problem) const {
    std::vector<std::vector<float>> outputs;
    for (std::int32_t past = first_; past <= kLast; ++past) {
      problem.move_to(past);
      StepResult step = problem.run();
      outputs.push_back(step.output);
      problem.cache() = std::move(step.cache);
    }
    return outputs;
  }
};

TEST_F(DecodeStepSequenceTest, EveryStepOfAGrowingCacheIsRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(2, 3));
  StepProblem problem(2, 3, kLast);
  for (std::int32_t past = first_; past <= kLast; ++past) {
    problem.move_to(past);
    problem.cache() = expect_right(problem, "past " + std::to_string(past)).cache;
  }
}

TEST_F(DecodeStepSequenceTest, StepsThatNobodyWaitsForAreTheSame) {
  MOQ_SKIP_UNSUPPORTED(shape_of(2, 3));
  StepProblem problem(2, 3, kLast);
  const std::vector<float> before = problem.cache();
  const std::vector<std::vector<float>> expected = one_by_one(problem);
  const std::vector<float> behind = problem.cache();
  problem.cache() = before;
  problem.upload();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  MOQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const DecodeStepArgs args = problem.args();
  MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::decode_step(args, stream);
  MOQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  MOQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  const std::size_t row = problem.input().size() * 2;
  const Buffer outputs(row * expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    problem.move_to(first_ + static_cast<std::int32_t>(i), stream);
    MOQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    MOQ_CUDA_CHECK(cudaMemcpyAsync(outputs.as<char>() + row * i, args.output, row,
                                   cudaMemcpyDeviceToDevice, stream));
  }
  EXPECT_EQ(problem.read().cache, behind);
  std::vector<std::byte> bytes(row * expected.size());
  outputs.copy_to(bytes);
  const std::vector<float> numbers = from_bytes(bytes, DType::kFloat16);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(std::equal(expected[i].begin(), expected[i].end(),
                           numbers.begin() + static_cast<std::ptrdiff_t>(i * expected[i].size())))
        << "past " << first_ + static_cast<std::int32_t>(i);
  }
  MOQ_CUDA_CHECK(cudaGraphExecDestroy(executable));
  MOQ_CUDA_CHECK(cudaGraphDestroy(graph));
  MOQ_CUDA_CHECK(cudaStreamDestroy(stream));
}

TEST_F(DecodeStepSequenceTest, StepsOnStreamsInTurnAreTheSame) {
  MOQ_SKIP_UNSUPPORTED(shape_of(7, 3));
  StepProblem problem(7, 3, 130);
  const StepResult expected = problem.run();
  const DecodeStepArgs args = problem.args();
  cudaStream_t streams[2];
  cudaEvent_t done = nullptr;
  for (cudaStream_t& stream : streams) {
    MOQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  MOQ_CUDA_CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
  for (int i = 0; i < repeats(50); ++i) {
    cuda::decode_step(args, streams[i % 2]);
    MOQ_CUDA_CHECK(cudaEventRecord(done, streams[i % 2]));
    MOQ_CUDA_CHECK(cudaStreamWaitEvent(streams[(i + 1) % 2], done, 0));
  }
  const StepResult result = problem.read();
  EXPECT_EQ(result.output, expected.output);
  EXPECT_EQ(result.cache, expected.cache);
  MOQ_CUDA_CHECK(cudaEventDestroy(done));
  for (cudaStream_t stream : streams) {
    MOQ_CUDA_CHECK(cudaStreamDestroy(stream));
  }
}

// ---- Steps that fail.

TEST(DecodeStepFailureTest, ALaunchThatFailsLeavesTheNextStepRight) {
  MOQ_SKIP_UNSUPPORTED(shape_of(3, 3));
  StepProblem problem(3, 3, 20);
  const StepResult expected = problem.run();
  const DecodeStepArgs args = problem.args();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  MOQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int i = 0; i < 3; ++i) {
    MOQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    EXPECT_NE(cudaStreamSynchronize(stream), cudaSuccess);  // ends the capture's validity
    EXPECT_THROW(cuda::decode_step(args, stream), Error);
    EXPECT_NE(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    (void)cudaGetLastError();
    const StepResult result = problem.run();
    EXPECT_EQ(result.output, expected.output);
    EXPECT_EQ(result.cache, expected.cache);
  }
  MOQ_CUDA_CHECK(cudaStreamDestroy(stream));
}

/// A step whose thread blocks have nothing to tell each other ends itself, and with it the
/// process's use of the GPU.
TEST(DecodeStepFailureTest, AStepThatCannotGoOnEndsAndTheNextIsRefused) {
  MOQ_SKIP_UNSUPPORTED(shape_of(1, 1));
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto abort_a_step = [] {
    StepProblem problem(1, 1, 1);
    const DecodeStepArgs args = problem.args();
    constexpr std::size_t kUnits = 128;  // where the thread blocks' rows are said
    if (cudaMemset(static_cast<char*>(args.state) + kUnits, 0, 128) != cudaSuccess) {
      std::_Exit(2);
    }
    cuda::decode_step(args, nullptr);
    if (cudaDeviceSynchronize() != cudaErrorLaunchFailure) {
      std::_Exit(3);
    }
    try {
      cuda::decode_step(args, nullptr);
    } catch (const Error&) {
      std::_Exit(0);
    }
    std::_Exit(4);
  };
  EXPECT_EXIT(abort_a_step(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace moq::kernels::testing
