#include "kernels/sampling.h"

#include <functional>
#include <numeric>
#include <set>
#include <string>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/kernels/chi_square.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels {
namespace {

using test::normal_vector;

struct Drawn {
  std::vector<std::int64_t> tokens;
  std::vector<float> probabilities;
};

/// Samples rows of `vocab_size` logits.
Drawn sample(const std::vector<float>& logits, std::int64_t vocab_size,
             const std::vector<SamplingRow>& rows) {
  Drawn drawn{std::vector<std::int64_t>(rows.size()), std::vector<float>(logits.size())};
  cpu::sample({.logits = logits.data(),
               .batch_size = std::ssize(rows),
               .vocab_size = vocab_size,
               .logits_stride = vocab_size,
               .rows = rows.data(),
               .tokens = drawn.tokens.data(),
               .probabilities = drawn.probabilities.data()});
  return drawn;
}

Drawn sample_one(const std::vector<float>& logits, const SamplingParams& params,
                 const std::vector<std::int64_t>& history = {}) {
  return sample(
      logits, std::ssize(logits),
      {{.params = params, .history = history.data(), .history_length = std::ssize(history)}});
}

/// Hugging Face's processors in float64, one after the other, each by its definition.
std::vector<double> reference(const std::vector<float>& logits, const SamplingParams& params,
                              const std::vector<std::int64_t>& history) {
  std::vector<double> scores(logits.begin(), logits.end());
  for (const std::int64_t token : std::set<std::int64_t>(history.begin(), history.end())) {
    scores[token] *=
        scores[token] < 0.0 ? params.repetition_penalty : 1.0 / params.repetition_penalty;
  }
  for (double& score : scores) {
    score /= params.temperature;
  }
  const auto remove = [&](const std::function<bool(std::size_t)>& is_removed) {
    const std::vector<double> before = scores;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i] = is_removed(i) ? -std::numeric_limits<double>::infinity() : scores[i];
    }
  };
  const auto probabilities = [&] {
    const double maximum = *std::max_element(scores.begin(), scores.end());
    std::vector<double> result;
    for (const double score : scores) {
      result.push_back(std::exp(score - maximum));
    }
    const double sum = std::accumulate(result.begin(), result.end(), 0.0);
    for (double& probability : result) {
      probability /= sum;
    }
    return result;
  };
  if (params.top_k > 0 && params.top_k < std::ssize(scores)) {
    std::vector<double> sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const double kth = sorted[params.top_k - 1];
    remove([&](std::size_t i) { return scores[i] < kth; });
  }
  if (params.top_p < 1.0F) {
    const std::vector<double> p = probabilities();
    std::vector<std::size_t> order(p.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
    std::set<std::size_t> kept;
    double cumulative = 0.0;
    for (const std::size_t token : order) {
      if (cumulative < static_cast<double>(params.top_p)) {
        kept.insert(token);
      }
      cumulative += p[token];
    }
    remove([&](std::size_t i) { return !kept.contains(i); });
  }
  const std::vector<double> p = probabilities();
  const double largest = *std::max_element(p.begin(), p.end());
  remove([&](std::size_t i) { return p[i] < static_cast<double>(params.min_p) * largest; });
  return probabilities();
}

struct Case {
  std::string name;
  SamplingParams params;
};

class SamplingCase : public ::testing::TestWithParam<Case> {
 protected:
  const SamplingParams& params = GetParam().params;
};

TEST_P(SamplingCase, DistributionIsTheProcessorsOneAfterTheOther) {
  for (const std::int64_t vocab_size : {1, 2, 17, 997, 50257}) {
    const std::vector<float> logits = normal_vector(vocab_size, 7, 4.0F);
    const std::vector<std::int64_t> history = {0, vocab_size / 2, vocab_size - 1, 0};
    const std::vector<float> actual = sample_one(logits, params, history).probabilities;
    const std::vector<double> exact = reference(logits, params, history);
    for (std::int64_t i = 0; i < vocab_size; ++i) {
      if (exact[i] == 0.0 || exact[i] > 1e-30) {
        ASSERT_EQ(actual[i] > 0.0F, exact[i] > 0.0) << "token " << i << " of " << vocab_size;
      }
      // Float32 differences of logits below 32 have absolute errors of 2^-19 at most.
      ASSERT_NEAR(actual[i], exact[i], exact[i] * 1e-5 + 1e-35)
          << "token " << i << " of " << vocab_size;
    }
  }
}

TEST_P(SamplingCase, DrawsOnlyTokensThatAreKeptAsOftenAsTheirProbability) {
  // The seed is fixed, so that the test says the same every time.
  constexpr int kDraws = 3000;
  constexpr std::int64_t kVocabulary = 41;
  const std::vector<float> logits = normal_vector(kVocabulary, 3, 1.0F);
  const std::vector<float> p = sample_one(logits, params).probabilities;
  std::vector<SamplingRow> rows(kDraws);
  std::vector<float> batch;
  for (int i = 0; i < kDraws; ++i) {
    rows[i] = {.params = params, .step = static_cast<std::uint64_t>(i)};
    rows[i].params.seed = 2026;
    batch.insert(batch.end(), logits.begin(), logits.end());
  }
  std::vector<int> counts(kVocabulary);
  for (const std::int64_t token : sample(batch, kVocabulary, rows).tokens) {
    ++counts[token];
  }
  test::expect_drawn_as_often(counts, p, kDraws);
}

INSTANTIATE_TEST_SUITE_P(
    Params, SamplingCase,
    ::testing::Values(Case{"plain", {}}, Case{"cold", {.temperature = 0.3F}},
                      Case{"hot", {.temperature = 20.0F}}, Case{"top_1", {.top_k = 1}},
                      Case{"top_5", {.top_k = 5}}, Case{"top_more_than_all", {.top_k = 1000000}},
                      Case{"top_p", {.top_p = 0.9F}}, Case{"tiny_top_p", {.top_p = 1e-6F}},
                      Case{"hot_top_p", {.temperature = 30.0F, .top_p = 0.7F}},
                      Case{"min_p", {.min_p = 0.1F}}, Case{"min_p_1", {.min_p = 1.0F}},
                      Case{"penalty", {.repetition_penalty = 1.7F}},
                      Case{"reward", {.repetition_penalty = 0.6F}},
                      Case{"all_together",
                           {.temperature = 0.8F,
                            .top_k = 30,
                            .top_p = 0.95F,
                            .min_p = 0.02F,
                            .repetition_penalty = 1.2F}}),
    [](const auto& info) { return info.param.name; });

TEST(GreedyTest, TakesTheLowestIndexOfTheLargestLogit) {
  std::vector<float> logits(100, -1.0F);
  logits[97] = logits[41] = logits[64] = 2.0F;
  const Drawn drawn = sample_one(logits, {.temperature = 0.0F});
  EXPECT_EQ(drawn.tokens[0], 41);
  EXPECT_EQ(drawn.probabilities[41], 1.0F);
  EXPECT_EQ(std::accumulate(drawn.probabilities.begin(), drawn.probabilities.end(), 0.0F), 1.0F);
}

TEST(GreedyTest, GivesTheSameTokenWithoutProbabilities) {
  const std::vector<float> logits = normal_vector(997, 5);
  const SamplingRow row{.params = {.temperature = 0.0F}};
  std::int64_t token = -1;
  cpu::sample({.logits = logits.data(),
               .batch_size = 1,
               .vocab_size = 997,
               .logits_stride = 997,
               .rows = &row,
               .tokens = &token});
  EXPECT_EQ(token, sample_one(logits, row.params).tokens[0]);
}

TEST(GreedyTest, AppliesTheRepetitionPenaltyOncePerToken) {
  const std::vector<float> logits = {1.0F, 4.0F, 3.0F, -1.0F};
  const SamplingParams params{.temperature = 0.0F, .repetition_penalty = 1.5F};
  EXPECT_EQ(sample_one(logits, params, {1}).tokens[0], 2);
  EXPECT_EQ(sample_one(logits, params, {1, 2, 2, 2}).tokens[0], 1);
}

TEST(SamplingTest, TopKKeepsWhatTiesWithTheLast) {
  const std::vector<float> p =
      sample_one({1.0F, 2.0F, 1.0F, 0.0F, 1.0F}, {.top_k = 2}).probabilities;
  EXPECT_TRUE(p[0] > 0.0F && p[1] > 0.0F && p[2] > 0.0F && p[4] > 0.0F);
  EXPECT_EQ(p[3], 0.0F);
}

TEST(SamplingTest, TopPRanksEqualProbabilitiesByIndex) {
  const std::vector<float> p =
      sample_one(std::vector<float>(8, 1.0F), {.top_p = 0.3F}).probabilities;
  EXPECT_EQ(p, (std::vector<float>{1 / 3.0F, 1 / 3.0F, 1 / 3.0F, 0, 0, 0, 0, 0}));
}

TEST(SamplingTest, TokensAtMinusInfinityAreNeverDrawn) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Drawn drawn = sample_one({-infinity, 0.0F, -infinity}, {.temperature = 5.0F});
  EXPECT_EQ(drawn.tokens[0], 1);
  EXPECT_EQ(drawn.probabilities, (std::vector<float>{0.0F, 1.0F, 0.0F}));
}

TEST(SamplingTest, ADrawDependsOnItsRowAlone) {
  constexpr std::int64_t kVocabulary = 307;
  const std::vector<float> logits = normal_vector(5 * kVocabulary, 9);
  std::vector<SamplingRow> rows;
  for (std::uint32_t i = 0; i < 5; ++i) {
    rows.push_back({.params = {.temperature = 1.5F, .seed = 77}, .stream = i, .step = 12});
  }
  const std::vector<std::int64_t> together = sample(logits, kVocabulary, rows).tokens;
  const ThreadScope threads(3);
  EXPECT_EQ(sample(logits, kVocabulary, rows).tokens, together);
  for (std::int64_t i = 0; i < 5; ++i) {
    const std::vector<float> row(logits.begin() + i * kVocabulary,
                                 logits.begin() + (i + 1) * kVocabulary);
    EXPECT_EQ(sample(row, kVocabulary, {rows[i]}).tokens[0], together[i]);
  }
}

TEST(SamplingTest, SeedStreamAndStepEachChangeTheDraw) {
  constexpr std::int64_t kVocabulary = 100003;
  const std::vector<float> logits(kVocabulary, 0.0F);
  std::vector<SamplingRow> rows(5);
  rows[1].params.seed = 1;
  rows[2].stream = 1;
  rows[3].step = 1;
  rows[4].step = std::uint64_t{1} << 32;
  std::set<std::int64_t> tokens;
  for (const SamplingRow& row : rows) {
    tokens.insert(sample(logits, kVocabulary, {row}).tokens[0]);
  }
  EXPECT_EQ(tokens.size(), rows.size());
}

TEST(SamplingTest, RefusesParametersOutOfRange) {
  const std::vector<float> logits = {0.0F, 1.0F};
  for (const SamplingParams& params : {SamplingParams{.temperature = -1.0F},
                                       {.temperature = NAN},
                                       {.top_k = -1},
                                       {.top_p = 0.0F},
                                       {.top_p = 1.5F},
                                       {.min_p = -0.1F},
                                       {.min_p = 1.1F},
                                       {.repetition_penalty = 0.0F}}) {
    EXPECT_THROW(sample_one(logits, params), Error);
  }
  EXPECT_THROW(sample_one(logits, {}, {2}), Error);
  EXPECT_THROW(sample_one(logits, {}, {-1}), Error);
  EXPECT_THROW(sample({}, 0, {{}}), Error);
}

TEST(SamplingTest, RefusesLogitsWithoutADistribution) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float temperature : {0.0F, 1.0F}) {
    for (const std::vector<float>& logits :
         {std::vector<float>{NAN, 1.0F}, {1.0F, infinity}, {-infinity, -infinity}}) {
      EXPECT_THROW(sample_one(logits, {.temperature = temperature}), Error);
    }
  }
}

}  // namespace
}  // namespace moq::kernels
