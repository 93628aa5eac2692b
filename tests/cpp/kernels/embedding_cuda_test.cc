// Sums of table rows on a GPU: the same float32 sums as in this file, rounded once.
#include <gtest/gtest.h>

#include <array>
#include <list>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/embedding.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/float_support.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;
using test::normal_vector;

constexpr std::int64_t kNumRows = 23;

struct Problem {
  std::int64_t num_tokens;
  std::int64_t hidden_size;
  std::vector<DType> tables;
  DType dtype = DType::kFloat16;
  std::size_t offset = 0;  ///< bytes before a table
  std::int32_t row_offset = 0;
  bool negative = false;  ///< one of the rows is no token
};

/// Runs a problem and compares with the sums.
void expect_sums(const Problem& problem) {
  const auto [num_tokens, n] = std::pair(problem.num_tokens, problem.hidden_size);
  DeviceEmbeddingArgs args;
  args.num_lookups = static_cast<std::int32_t>(problem.tables.size());
  args.num_tokens = num_tokens;
  args.hidden_size = n;
  args.dtype = problem.dtype;
  std::list<OnDevice<std::byte>> tables;
  std::list<OnDevice<std::int32_t>> rows;
  std::vector<float> expected(static_cast<std::size_t>(num_tokens * n));
  for (int l = 0; l < args.num_lookups; ++l) {
    const DType dtype = problem.tables[l];
    const std::vector<float> numbers =
        rounded(normal_vector(kNumRows * n, static_cast<unsigned>(l)), dtype);
    std::vector<std::byte> bytes(problem.offset);
    const std::vector<std::byte> stored = to_bytes(numbers, dtype);
    bytes.insert(bytes.end(), stored.begin(), stored.end());
    std::vector<std::int32_t> taken;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      const auto row = static_cast<std::int32_t>((t * 7 + l * 5) % kNumRows);
      taken.push_back(row - problem.row_offset);
      for (std::int64_t j = 0; j < n; ++j) {
        const float number = numbers[static_cast<std::size_t>(row * n + j)];
        float& sum = expected[static_cast<std::size_t>(t * n + j)];
        sum = l == 0 ? number : sum + number;
      }
    }
    if (problem.negative && l == 0) {
      taken[0] = -1;  // in place of row 0
    }
    tables.emplace_back(Device::kCuda, bytes);
    rows.emplace_back(Device::kCuda, taken);
    args.lookups[l] = {.data = tables.back().data() + problem.offset,
                       .dtype = dtype,
                       .rows = rows.back().data(),
                       .row_offset = problem.row_offset};
  }
  const OnDevice<std::byte> output(
      Device::kCuda, std::vector<std::byte>(expected.size() * size_of(problem.dtype)));
  args.output = output.data();
  cuda::embedding(args, nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  EXPECT_EQ(from_bytes(output.read(), problem.dtype), rounded(expected, problem.dtype));
}

class EmbeddingCuda
    : public ::testing::TestWithParam<std::tuple<std::vector<DType>, DType, std::int64_t>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  Problem problem{.num_tokens = 67,
                  .hidden_size = std::get<std::int64_t>(GetParam()),
                  .tables = std::get<std::vector<DType>>(GetParam()),
                  .dtype = std::get<DType>(GetParam())};
};

TEST_P(EmbeddingCuda, AddsOneRowOfEachTable) {
  expect_sums(problem);
  problem.num_tokens = 1;
  expect_sums(problem);
}

TEST_P(EmbeddingCuda, ReadsTablesFromAnyAddress) {
  problem.offset = 4;
  expect_sums(problem);
}

constexpr DType kHalf = DType::kFloat16;
constexpr DType kBrain = DType::kBFloat16;
constexpr DType kSingle = DType::kFloat32;
INSTANTIATE_TEST_SUITE_P(
    Tables, EmbeddingCuda,
    ::testing::Combine(::testing::Values(std::vector{kHalf}, std::vector{kBrain},
                                         std::vector{kSingle}, std::vector{kHalf, kHalf},
                                         std::vector{kBrain, kBrain, kBrain},
                                         std::vector{kHalf, kSingle, kBrain}),
                       ::testing::Values(kHalf, kBrain, kSingle),
                       ::testing::Values(1, 7, 8, 100, 768, 4096)));

class EmbeddingCudaArgs : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(EmbeddingCudaArgs, AddsTheOffsetToEachRow) {
  expect_sums({.num_tokens = 30, .hidden_size = 64, .tables = {kHalf, kHalf}, .row_offset = 2});
  expect_sums({.num_tokens = 30, .hidden_size = 64, .tables = {kHalf, kHalf}, .row_offset = -2});
}

TEST_F(EmbeddingCudaArgs, NoTokenTakesTheFirstRow) {
  expect_sums({.num_tokens = 3, .hidden_size = 64, .tables = {kHalf, kHalf}, .negative = true});
}

TEST_F(EmbeddingCudaArgs, NothingToComputeIsNoError) {
  DeviceEmbeddingArgs args;
  args.num_lookups = 1;
  args.hidden_size = 8;
  cuda::embedding(args, nullptr);
}

TEST_F(EmbeddingCudaArgs, BadArgumentsAreNamed) {
  const auto message = [](const DeviceEmbeddingArgs& args) {
    return error_of([&] { cuda::embedding(args, nullptr); });
  };
  const Buffer memory(4096);
  const DeviceEmbeddingArgs args{
      .lookups = {{.data = memory.data(), .rows = memory.as<std::int32_t>()}},
      .num_lookups = 1,
      .output = memory.data(),
      .num_tokens = 1,
      .hidden_size = 8};
  DeviceEmbeddingArgs bad = args;
  bad.num_tokens = -1;
  EXPECT_EQ(message(bad), "embedding: num_tokens must be >= 0, got -1");
  bad = args;
  bad.hidden_size = 0;
  EXPECT_EQ(message(bad), "embedding: hidden_size must be >= 1, got 0");
  bad = args;
  bad.num_lookups = 4;
  EXPECT_EQ(message(bad), "embedding: num_lookups must be in [1, 3], got 4");
  bad = args;
  bad.dtype = DType::kInt8;
  EXPECT_EQ(message(bad), "embedding: dtype must be float16, bfloat16 or float32, got int8");
  bad = args;
  bad.lookups[0].dtype = DType::kInt8;
  EXPECT_EQ(message(bad), "embedding: a table must be float32, float16 or bfloat16, got int8");
  bad = args;
  bad.output = nullptr;
  EXPECT_EQ(message(bad), "embedding: output must not be null");
  bad = args;
  bad.lookups[0].rows = nullptr;
  EXPECT_EQ(message(bad), "embedding: a table and its rows must not be null");
}

}  // namespace
}  // namespace moq::kernels::testing
