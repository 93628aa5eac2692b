// Sampling on a GPU draws what the CPU draws: both keep the same tokens and invert the same
// distribution function at the same uniform.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/sampling.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/chi_square.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;
using test::normal_vector;
using Tokens = std::vector<std::int32_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::int32_t kNoToken = DeviceSamplingArgs::kNoToken;

/// Rows of logits on both devices, and what each row has seen.
class Batch {
 public:
  Batch(std::vector<float> logits, std::int64_t vocab_size,
        std::vector<std::vector<std::int64_t>> histories = {})
      : vocab_size_(vocab_size),
        size_(std::ssize(logits) / vocab_size),
        histories_(std::move(histories)),
        logits_(logits),
        device_logits_(Device::kCuda, std::move(logits)) {
    histories_.resize(size_);
    const std::size_t words = (vocab_size + 31) / 32;
    seen_.resize(size_ * words);
    for (std::int64_t i = 0; i < size_; ++i) {
      for (const std::int64_t token : histories_[i]) {
        seen_[history_row(i) * words + token / 32] |= 1U << (token % 32);
      }
    }
  }

  std::int64_t size() const { return size_; }

  /// The same parameters for every row, each with its own stream.
  std::vector<DeviceSamplingRow> rows(const SamplingParams& params, std::uint64_t step = 0) const {
    std::vector<DeviceSamplingRow> rows;
    for (std::int64_t i = 0; i < size_; ++i) {
      rows.push_back({.params = params, .step = step, .stream = static_cast<std::uint32_t>(i)});
    }
    return rows;
  }

  Tokens on_gpu(std::vector<DeviceSamplingRow> rows, bool all_greedy = false) const {
    for (std::int64_t i = 0; i < size_; ++i) {
      rows[i].history_row = static_cast<std::uint32_t>(history_row(i));
    }
    const OnDevice<DeviceSamplingRow> device_rows(Device::kCuda, rows);
    const OnDevice<std::uint32_t> seen(Device::kCuda, seen_);
    const OnDevice<std::int32_t> tokens(Device::kCuda, Tokens(size_, -7));
    cuda::sample({.logits = device_logits_.data(),
                  .batch_size = size_,
                  .vocab_size = vocab_size_,
                  .logits_stride = vocab_size_,
                  .rows = device_rows.data(),
                  .seen = seen.data(),
                  .tokens = tokens.data(),
                  .all_greedy = all_greedy},
                 nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    const Tokens drawn = tokens.read();
    std::vector<std::uint32_t> expected = seen_;
    for (std::int64_t i = 0; i < size_; ++i) {
      if (drawn[i] >= 0) {
        expected[history_row(i) * ((vocab_size_ + 31) / 32) + drawn[i] / 32] |= 1U
                                                                                << (drawn[i] % 32);
      }
    }
    EXPECT_EQ(seen.read(), expected) << "of what has been seen, not just the drawn token's bits";
    return drawn;
  }

  Tokens on_cpu(const std::vector<DeviceSamplingRow>& rows,
                std::vector<float>* probabilities = nullptr) const {
    std::vector<SamplingRow> cpu_rows;
    for (std::int64_t i = 0; i < size_; ++i) {
      cpu_rows.push_back({.params = rows[i].params,
                          .history = histories_[i].data(),
                          .history_length = std::ssize(histories_[i]),
                          .stream = rows[i].stream,
                          .step = rows[i].step});
    }
    std::vector<std::int64_t> tokens(size_);
    if (probabilities != nullptr) {
      probabilities->resize(logits_.size());
    }
    cpu::sample({.logits = logits_.data(),
                 .batch_size = size_,
                 .vocab_size = vocab_size_,
                 .logits_stride = vocab_size_,
                 .rows = cpu_rows.data(),
                 .tokens = tokens.data(),
                 .probabilities = probabilities != nullptr ? probabilities->data() : nullptr});
    return Tokens(tokens.begin(), tokens.end());
  }

 private:
  /// Not the row's own number.
  std::int64_t history_row(std::int64_t row) const { return size_ - 1 - row; }

  std::int64_t vocab_size_;
  std::int64_t size_;
  std::vector<std::vector<std::int64_t>> histories_;
  std::vector<std::uint32_t> seen_;
  std::vector<float> logits_;
  OnDevice<float> device_logits_;
};

/// A few tokens, some of them twice, some of the last words.
std::vector<std::vector<std::int64_t>> histories(std::int64_t batch_size, std::int64_t vocab_size) {
  std::vector<std::vector<std::int64_t>> result;
  for (std::int64_t i = 0; i < batch_size; ++i) {
    result.emplace_back();
    for (std::int64_t j = 0; j < 2 * i; ++j) {
      result.back().push_back((j * j * 37 + i) % vocab_size);
    }
    result.back().push_back(vocab_size - 1);
    result.back().push_back(vocab_size - 1);
  }
  return result;
}

void expect_same(const Batch& batch, const SamplingParams& params) {
  const std::vector<DeviceSamplingRow> rows = batch.rows(params, 5);
  EXPECT_EQ(batch.on_gpu(rows), batch.on_cpu(rows));
}

class SamplingCuda : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  std::int64_t vocab_size = GetParam();
  std::int64_t batch_size = vocab_size <= 5000 ? 64 : vocab_size <= 200000 ? 16 : 3;
};

TEST_P(SamplingCuda, DrawsTheTokensOfTheCpu) {
  // The CPU's sums of float64 are rounded, the GPU's weights are to 2^-44: where the uniform meets
  // the boundary of two tokens that closely, they may differ.
  const std::int64_t steps = repeats(54);
  std::mt19937 random(11);
  const auto one_of = [&](auto... values) {
    const std::common_type_t<decltype(values)...> all[] = {values...};
    return all[random() % sizeof...(values)];
  };
  std::int64_t different = 0;
  for (const float deviation : {0.0F, 1.0F, 4.0F}) {
    const Batch batch(normal_vector(batch_size * vocab_size, 3, deviation), vocab_size,
                      histories(batch_size, vocab_size));
    for (std::int64_t step = 0; step < steps; ++step) {
      std::vector<DeviceSamplingRow> rows = batch.rows({}, (std::uint64_t{1} << 33) + step);
      for (DeviceSamplingRow& row : rows) {
        row.params = {.temperature = one_of(1.0F, 0.7F, 0.05F, 10.0F, 0.0F),
                      .top_k = one_of(0, 1, 2, 50, 1000, 2000000),
                      .top_p = one_of(1.0F, 0.95F, 0.5F, 0.01F, 1e-7F),
                      .min_p = one_of(0.0F, 0.0F, 0.02F, 0.5F, 1.0F),
                      .repetition_penalty = one_of(1.0F, 1.2F, 0.7F, 3.0F),
                      .seed = random()};
      }
      const Tokens gpu = batch.on_gpu(rows);
      const Tokens cpu = batch.on_cpu(rows);
      for (std::int64_t i = 0; i < batch_size; ++i) {
        different += gpu[i] != cpu[i] ? 1 : 0;
      }
    }
  }
  const std::int64_t draws = 3 * steps * batch_size;
  EXPECT_LE(different, draws / 10000) << "of " << draws << " draws";
}

TEST_P(SamplingCuda, TakesTheFirstOfTheLargestLogits) {
  std::vector<float> logits = normal_vector(8 * vocab_size, 7);
  for (std::int64_t i = 0; i < 8; ++i) {  // ties, of zeros too
    for (std::int64_t j = 0; j < 3; ++j) {
      logits[i * vocab_size + (i * 7919 + j * 104729) % vocab_size] = i == 0 ? 9.0F : 6.0F;
    }
  }
  for (std::int64_t j = 0; j < vocab_size; ++j) {
    logits[j] = j % 5 == 3 ? -0.0F : j % 7 == 5 ? 0.0F : -1.0F;
  }
  const Batch batch(logits, vocab_size, histories(8, vocab_size));
  const std::vector<DeviceSamplingRow> rows = batch.rows({.temperature = 0.0F});
  EXPECT_EQ(batch.on_gpu(rows), batch.on_cpu(rows));
  EXPECT_EQ(batch.on_gpu(rows, true), batch.on_cpu(rows));
  expect_same(batch, {.temperature = 0.0F, .repetition_penalty = 1.5F});
}

TEST_P(SamplingCuda, ARowWithoutADistributionDrawsNoToken) {
  std::vector<float> logits = normal_vector(6 * vocab_size, 9);
  logits[1 * vocab_size + vocab_size / 3] = kNan;
  logits[2 * vocab_size + vocab_size - 1] = kInfinity;
  std::fill_n(logits.begin() + 3 * vocab_size, vocab_size, -kInfinity);
  logits[4 * vocab_size] = -kNan;
  const Batch batch(logits, vocab_size);
  for (const float temperature : {0.0F, 0.8F}) {
    for (const bool all_greedy : {false, temperature == 0.0F}) {
      const Tokens tokens = batch.on_gpu(
          batch.rows({.temperature = temperature, .top_k = 3, .top_p = 0.9F}), all_greedy);
      for (std::int64_t i = 0; i < 6; ++i) {
        EXPECT_EQ(tokens[i] == kNoToken, i >= 1 && i <= 4) << "row " << i;
      }
    }
  }
}

TEST_P(SamplingCuda, EqualLogitsAreKeptByIndex) {
  const Batch batch(std::vector<float>(batch_size * vocab_size, -3.25F), vocab_size);
  for (const float top_p : {1.0F, 0.6F, 0.3F, 1e-6F}) {
    expect_same(batch, {.top_p = top_p});
    expect_same(batch, {.top_k = 2, .top_p = top_p, .min_p = 1.0F});
  }
}

TEST_P(SamplingCuda, TiesAtABoundaryAreKeptAsOnTheCpu) {
  std::vector<float> logits(batch_size * vocab_size);
  for (std::int64_t i = 0; i < std::ssize(logits); ++i) {
    logits[i] = 0.5F * static_cast<float>(i * 7919 % 5);
  }
  const Batch batch(logits, vocab_size);
  for (const std::int64_t top_k : {1, 3, 40}) {
    expect_same(batch, {.top_k = top_k});
    expect_same(batch, {.top_k = top_k, .top_p = 0.55F});
  }
  for (const float top_p : {0.2F, 0.5F, 0.77F, 0.93F}) {
    expect_same(batch, {.top_p = top_p});
  }
}

TEST_P(SamplingCuda, LargeLogitsMayLieSideBySide) {
  std::vector<float> logits(batch_size * vocab_size);
  for (std::int64_t i = 0; i < std::ssize(logits); ++i) {
    logits[i] = -0.01F * static_cast<float>(std::abs(i % vocab_size - vocab_size / 3));
  }
  const Batch batch(logits, vocab_size);
  for (const std::int64_t top_k : {0, 5, 200, 512, 513}) {
    expect_same(batch, {.top_k = top_k});
    expect_same(batch, {.top_k = top_k, .top_p = 0.8F});
    // Weights that differ by less than a float's step: equal ones of different scores.
    expect_same(batch, {.temperature = 1e6F, .top_k = top_k, .top_p = 0.01F});
  }
}

TEST_P(SamplingCuda, HugeLogitsAndThoseAtMinusInfinityAreFine) {
  std::vector<float> logits = normal_vector(batch_size * vocab_size, 5, 1e37F);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = i % vocab_size % 3 == 1 ? -kInfinity : logits[i];
  }
  const Batch batch(logits, vocab_size);
  expect_same(batch, {.temperature = 1e37F});
  expect_same(batch, {.temperature = 1e37F, .top_k = 5, .top_p = 0.8F, .min_p = 0.01F});
  expect_same(batch, {.temperature = 1e-38F});
}

TEST_P(SamplingCuda, ADrawDependsOnItsRowAlone) {
  const std::vector<float> logits = normal_vector(9 * vocab_size, 13, 2.0F);
  const Batch batch(logits, vocab_size);
  const std::vector<DeviceSamplingRow> rows = batch.rows({.top_p = 0.9F, .seed = 77}, 12);
  const Tokens together = batch.on_gpu(rows);
  EXPECT_EQ(batch.on_gpu(rows), together);
  for (const std::int64_t i : {0, 5, 8}) {
    const auto begin = logits.begin() + i * vocab_size;
    const Batch alone(std::vector<float>(begin, begin + vocab_size), vocab_size);
    EXPECT_EQ(alone.on_gpu({rows[i]})[0], together[i]);
  }
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, SamplingCuda,
                         ::testing::Values(1, 2, 33, 997, 4096, 4097, 4105, 50257, 128256, 350003));

class SamplingCudaArgs : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(SamplingCudaArgs, DrawsTokensAsOftenAsTheirProbability) {
  constexpr int kDraws = 20000;
  constexpr std::int64_t kVocabulary = 211;
  std::vector<float> logits;
  for (int i = 0; i < kDraws; ++i) {
    const std::vector<float> row = normal_vector(kVocabulary, 3);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  const Batch batch(logits, kVocabulary);
  for (const SamplingParams& params :
       {SamplingParams{.seed = 2026},
        {.temperature = 0.7F, .top_k = 100, .top_p = 0.9F, .seed = 5}}) {
    std::vector<int> counts(kVocabulary);
    const std::vector<DeviceSamplingRow> rows = batch.rows(params);
    for (const std::int32_t token : batch.on_gpu(rows)) {
      ++counts[token];
    }
    std::vector<float> probabilities;
    batch.on_cpu(rows, &probabilities);
    test::expect_drawn_as_often(counts, std::span(probabilities).first(kVocabulary), kDraws);
  }
}

TEST_F(SamplingCudaArgs, RowsMayLieApart) {
  constexpr std::int64_t kVocabulary = 5003;
  const std::vector<float> logits = normal_vector(4 * kVocabulary, 1);
  const OnDevice<float> device_logits(Device::kCuda, logits);
  const Batch batch(logits, kVocabulary);
  const std::vector<DeviceSamplingRow> rows = batch.rows({});
  const OnDevice<DeviceSamplingRow> device_rows(Device::kCuda, {rows[0], rows[2]});
  const OnDevice<std::int32_t> tokens(Device::kCuda, Tokens(2));
  cuda::sample({.logits = device_logits.data(),
                .batch_size = 2,
                .vocab_size = kVocabulary,
                .logits_stride = 2 * kVocabulary,
                .rows = device_rows.data(),
                .tokens = tokens.data()},
               nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  const Tokens expected = batch.on_cpu(rows);
  EXPECT_EQ(tokens.read(), (Tokens{expected[0], expected[2]}));
}

TEST_F(SamplingCudaArgs, GreedyRowsNeedNoParameters) {
  const std::vector<float> logits = {1.0F, 4.0F, 3.0F, -1.0F};
  const OnDevice<float> device_logits(Device::kCuda, logits);
  const OnDevice<std::int32_t> token(Device::kCuda, Tokens(1));
  cuda::sample({.logits = device_logits.data(),
                .batch_size = 1,
                .vocab_size = 4,
                .tokens = token.data(),
                .all_greedy = true},
               nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
  EXPECT_EQ(token.read()[0], 1);
}

TEST_F(SamplingCudaArgs, NothingToDrawIsNoError) {
  cuda::sample({.batch_size = 0, .vocab_size = 8}, nullptr);
}

TEST_F(SamplingCudaArgs, BadArgumentsAreNamed) {
  const auto message = [](const DeviceSamplingArgs& args) {
    return error_of([&] { cuda::sample(args, nullptr); });
  };
  const Buffer memory(4096);
  const DeviceSamplingArgs args{.logits = memory.as<float>(),
                                .batch_size = 2,
                                .vocab_size = 8,
                                .logits_stride = 8,
                                .rows = memory.as<DeviceSamplingRow>(),
                                .tokens = memory.as<std::int32_t>()};
  DeviceSamplingArgs bad = args;
  bad.batch_size = -1;
  EXPECT_EQ(message(bad), "sample: batch_size must be in [0, 268435455], got -1");
  bad = args;
  bad.vocab_size = 0;
  EXPECT_EQ(message(bad), "sample: vocab_size must be in [1, 524287], got 0");
  bad = args;
  bad.tokens = nullptr;
  EXPECT_EQ(message(bad), "sample: logits and tokens must not be null");
  bad = args;
  bad.rows = nullptr;
  EXPECT_EQ(message(bad), "sample: rows must not be null");
  bad = args;
  bad.logits_stride = 7;
  EXPECT_EQ(message(bad), "sample: logits_stride must be >= vocab_size, got 7 and 8");
}

}  // namespace
}  // namespace moq::kernels::testing
