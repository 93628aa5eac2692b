#include "kernels/attention.h"

#include <string>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels {
namespace {

using test::expect_accurate;
using test::normal_vector;

struct Heads {
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;

  std::int64_t query_width() const { return num_heads * head_dim; }
  std::int64_t kv_width() const { return num_kv_heads * head_dim; }
  std::int64_t row_width() const { return query_width() + 2 * kv_width(); }
};

/// New and past tokens of one sequence.
struct Lengths {
  std::int64_t num_tokens;
  std::int64_t past_length;
};

/// The formula of attention.h, one query head of one token at a time, in Number.
template <typename Number>
std::vector<Number> reference(const AttentionArgs& args, std::int64_t total_tokens) {
  std::vector<Number> output(static_cast<std::size_t>(total_tokens * args.output_stride),
                             Number{0});
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    for (std::int64_t i = 0; i < sequence.num_tokens; ++i) {
      const std::int64_t token = sequence.token_begin + i;
      const std::int64_t position = sequence.past_length + i;
      const std::int64_t num_keys =
          args.causal ? position + 1 : sequence.past_length + sequence.num_tokens;
      for (std::int64_t h = 0; h < args.num_heads; ++h) {
        const float* query = args.query + token * args.query_stride + h * args.head_dim;
        const std::int64_t base = sequence.slot * args.slot_stride +
                                  h / (args.num_heads / args.num_kv_heads) * args.kv_head_stride;
        std::vector<Number> weights(static_cast<std::size_t>(num_keys));
        for (std::int64_t j = 0; j < num_keys; ++j) {
          Number dot = 0;
          for (std::int64_t d = 0; d < args.head_dim; ++d) {
            dot += static_cast<Number>(query[d]) *
                   static_cast<Number>(args.keys[base + j * args.key_stride + d]);
          }
          weights[j] = dot * static_cast<Number>(args.scale);
          if (args.alibi_slopes != nullptr) {
            weights[j] -= static_cast<Number>(args.alibi_slopes[h]) *
                          static_cast<Number>(std::abs(position - j));
          }
        }
        const Number maximum = *std::max_element(weights.begin(), weights.end());
        Number sum = 0;
        for (Number& weight : weights) {
          weight = std::exp(weight - maximum);
          sum += weight;
        }
        Number* out = &output[token * args.output_stride + h * args.head_dim];
        for (std::int64_t d = 0; d < args.head_dim; ++d) {
          for (std::int64_t j = 0; j < num_keys; ++j) {
            out[d] +=
                weights[j] / sum * static_cast<Number>(args.values[base + j * args.key_stride + d]);
          }
        }
      }
    }
  }
  return output;
}

/// A ragged batch: packed [q | k | v] rows of the new tokens, and a cache that holds the past ones.
/// Sequence s lives in slot num_sequences - 1 - s, so that slots and sequences differ.
class Batch {
 public:
  Batch(const Heads& heads, const std::vector<Lengths>& lengths, unsigned seed = 1)
      : heads_(heads) {
    std::int64_t longest = 0;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      sequences_.push_back({total_tokens_, lengths[s].num_tokens,
                            static_cast<std::int64_t>(lengths.size() - 1 - s),
                            lengths[s].past_length});
      total_tokens_ += lengths[s].num_tokens;
      longest = std::max(longest, lengths[s].num_tokens + lengths[s].past_length);
    }
    capacity_ = longest + 3;
    rows_ = normal_vector(total_tokens_ * heads.row_width(), seed);
    const std::int64_t cache_size = std::ssize(lengths) * heads.kv_width() * capacity_;
    keys_ = normal_vector(cache_size, seed + 1);
    values_ = normal_vector(cache_size, seed + 2);
  }

  AppendKvArgs append_args() {
    return {.keys = rows_.data() + heads_.query_width(),
            .values = rows_.data() + heads_.query_width() + heads_.kv_width(),
            .token_stride = heads_.row_width(),
            .sequences = sequences_.data(),
            .num_sequences = std::ssize(sequences_),
            .num_kv_heads = heads_.num_kv_heads,
            .head_dim = heads_.head_dim,
            .key_cache = keys_.data(),
            .value_cache = values_.data(),
            .num_slots = std::ssize(sequences_),
            .capacity = capacity_};
  }

  AttentionArgs attention_args(bool causal) {
    output_.assign(static_cast<std::size_t>(total_tokens_ * heads_.query_width()), -1.0F);
    return {.query = rows_.data(),
            .query_stride = heads_.row_width(),
            .keys = keys_.data(),
            .values = values_.data(),
            .slot_stride = heads_.kv_width() * capacity_,
            .kv_head_stride = capacity_ * heads_.head_dim,
            .key_stride = heads_.head_dim,
            .sequences = sequences_.data(),
            .num_sequences = std::ssize(sequences_),
            .num_heads = heads_.num_heads,
            .num_kv_heads = heads_.num_kv_heads,
            .head_dim = heads_.head_dim,
            .causal = causal,
            .scale = 1.0F / std::sqrt(static_cast<float>(heads_.head_dim)),
            .output = output_.data(),
            .output_stride = heads_.query_width()};
  }

  /// The same sequences without a cache: keys and values in the packed rows.
  AttentionArgs packed_args(bool causal) {
    AttentionArgs args = attention_args(causal);
    for (AttentionSequence& sequence : sequences_) {
      sequence.slot = sequence.token_begin;
      sequence.past_length = 0;
    }
    args.keys = rows_.data() + heads_.query_width();
    args.values = args.keys + heads_.kv_width();
    args.slot_stride = args.key_stride = heads_.row_width();
    args.kv_head_stride = heads_.head_dim;
    return args;
  }

  std::int64_t total_tokens() const { return total_tokens_; }
  std::int64_t capacity() const { return capacity_; }
  const Heads& heads() const { return heads_; }
  std::vector<AttentionSequence>& sequences() { return sequences_; }
  std::vector<float>& rows() { return rows_; }
  std::vector<float>& keys() { return keys_; }
  std::vector<float>& values() { return values_; }
  const std::vector<float>& output() const { return output_; }

 private:
  Heads heads_;
  std::vector<AttentionSequence> sequences_;
  std::int64_t total_tokens_ = 0;
  std::int64_t capacity_ = 0;
  std::vector<float> rows_;
  std::vector<float> keys_;
  std::vector<float> values_;
  std::vector<float> output_;
};

void expect_reference(const AttentionArgs& args, const Batch& batch) {
  cpu::attention(args);
  expect_accurate(batch.output(), reference<float>(args, batch.total_tokens()),
                  reference<double>(args, batch.total_tokens()));
}

struct Case {
  std::string name;
  Heads heads;
  std::vector<Lengths> lengths;
};

class AttentionCase : public ::testing::TestWithParam<Case> {
 protected:
  Batch batch{GetParam().heads, GetParam().lengths};
};

TEST_P(AttentionCase, CausalAgreesWithFloat64) {
  expect_reference(batch.attention_args(true), batch);
}

TEST_P(AttentionCase, BidirectionalAgreesWithFloat64) {
  expect_reference(batch.attention_args(false), batch);
}

TEST_P(AttentionCase, PackedRowsServeAsKeysWithoutACache) {
  expect_reference(batch.packed_args(false), batch);
}

TEST_P(AttentionCase, AlibiPenalisesDistance) {
  std::vector<float> slopes;
  for (std::int64_t h = 0; h < batch.heads().num_heads; ++h) {
    slopes.push_back(std::exp2(-static_cast<float>(h + 1)));
  }
  for (const bool causal : {true, false}) {
    AttentionArgs args = batch.attention_args(causal);
    args.alibi_slopes = slopes.data();
    expect_reference(args, batch);
  }
}

TEST_P(AttentionCase, ASequenceGetsTheSameBitsAloneAndWithAnyNumberOfThreads) {
  cpu::attention(batch.attention_args(true));
  const std::vector<float> together = batch.output();
  const std::int64_t width = batch.heads().query_width();
  for (const int num_threads : {1, 2, 5}) {
    const ThreadScope threads(num_threads);
    for (std::size_t s = 0; s < batch.sequences().size(); ++s) {
      AttentionArgs args = batch.attention_args(true);
      args.sequences += s;
      args.num_sequences = 1;
      cpu::attention(args);
      const std::int64_t begin = args.sequences->token_begin * width;
      const std::int64_t end = begin + args.sequences->num_tokens * width;
      ASSERT_TRUE(std::equal(batch.output().begin() + begin, batch.output().begin() + end,
                             together.begin() + begin))
          << "sequence " << s << " on " << num_threads << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionCase,
    ::testing::Values(
        Case{"one_of_everything", {1, 1, 1}, {{1, 0}}},
        Case{"odd_head_dim", {3, 3, 7}, {{5, 0}, {1, 13}, {3, 70}}},
        Case{"head_dim_of_a_prime_above_the_vector", {2, 1, 37}, {{11, 64}, {1, 63}}},
        Case{"two_rows_decode", {4, 2, 64}, {{1, 127}, {1, 128}, {1, 129}, {2, 64}}},
        Case{"grouped_heads", {9, 3, 64}, {{1, 200}, {1, 5}, {7, 0}, {2, 31}, {40, 3}}},
        Case{"many_queries_of_one_head", {8, 1, 16}, {{1, 33}, {9, 64}}},
        Case{"prefill_over_several_tiles", {2, 2, 64}, {{130, 0}, {65, 77}}},
        Case{"wide_heads", {2, 1, 256}, {{3, 66}, {17, 0}}},
        Case{"empty_sequence_between", {2, 2, 32}, {{2, 4}, {0, 9}, {0, 0}, {6, 0}}},
        Case{"gpt2_decode", {12, 12, 64}, {{1, 447}}},
        Case{"keys_in_several_spans", {4, 2, 24}, {{1, 255}, {1, 256}, {9, 503}, {1, 1023}}},
        Case{"more_rows_than_a_split_tile", {2, 2, 8}, {{65, 300}}},
        Case{"minilm_encoder", {12, 12, 32}, {{64, 0}, {23, 0}, {128, 0}}}),
    [](const auto& info) { return info.param.name; });

class AttentionCut : public ::testing::TestWithParam<Heads> {};

TEST_P(AttentionCut, ATokenGetsTheSameBitsHoweverItsPromptIsCutIntoCalls) {
  constexpr std::int64_t kTokens = 600;
  Batch batch(GetParam(), {{kTokens, 0}});
  cpu::append_kv(batch.append_args());
  cpu::attention(batch.attention_args(true));
  const std::vector<float> whole = batch.output();
  const ThreadScope threads(2);
  for (const std::vector<std::int64_t>& pieces :
       {std::vector<std::int64_t>{1, 2, 3, 4, 5, 63, 64, 65, 129, 264},
        {255, 1, 1, 343},
        {599, 1}}) {
    AttentionArgs args = batch.attention_args(true);
    AttentionSequence& sequence = batch.sequences()[0];
    sequence = {0, 0, 0, 0};
    for (const std::int64_t piece : pieces) {
      sequence.token_begin = sequence.past_length += sequence.num_tokens;
      sequence.num_tokens = piece;
      cpu::attention(args);
    }
    EXPECT_EQ(batch.output(), whole);
  }
}

INSTANTIATE_TEST_SUITE_P(Heads, AttentionCut,
                         ::testing::Values(Heads{2, 2, 64}, Heads{9, 3, 64}, Heads{2, 1, 37},
                                           Heads{8, 1, 16}));

TEST(AttentionTest, KeysBehindTheLastVisibleOneAreNotRead) {
  Batch batch({2, 2, 19}, {{3, 30}, {1, 12}});
  const AttentionArgs args = batch.attention_args(true);
  cpu::attention(args);
  const std::vector<float> expected = batch.output();
  for (std::size_t s = 0; s < batch.sequences().size(); ++s) {
    const AttentionSequence& sequence = batch.sequences()[s];
    for (std::int64_t h = 0; h < 2; ++h) {
      const std::int64_t row = (sequence.slot * 2 + h) * batch.capacity();
      const std::int64_t begin = (row + sequence.past_length + sequence.num_tokens) * 19;
      const std::int64_t end = (row + batch.capacity()) * 19;
      std::fill(batch.keys().begin() + begin, batch.keys().begin() + end, NAN);
      std::fill(batch.values().begin() + begin, batch.values().begin() + end, NAN);
    }
  }
  cpu::attention(batch.attention_args(true));
  EXPECT_EQ(batch.output(), expected);
}

TEST(AttentionTest, LargeScoresDoNotOverflow) {
  Batch batch({1, 1, 64}, {{80, 100}});
  for (float& value : batch.keys()) {
    value *= 100.0F;
  }
  expect_reference(batch.attention_args(true), batch);
}

TEST(AttentionTest, WritesNothingBetweenTheRowsOfAWiderOutput) {
  Batch batch({2, 2, 5}, {{3, 0}});
  AttentionArgs args = batch.attention_args(true);
  cpu::attention(args);
  std::vector<float> wide(3 * 13, -1.0F);
  args.output = wide.data();
  args.output_stride = 13;
  cpu::attention(args);
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t j = 0; j < 13; ++j) {
      EXPECT_EQ(wide[t * 13 + j], j < 10 ? batch.output()[t * 10 + j] : -1.0F);
    }
  }
}

TEST(AttentionTest, RefusesHeadsThatDoNotDivideAndNegativeLengths) {
  Batch batch({4, 2, 8}, {{1, 1}});
  AttentionArgs args = batch.attention_args(true);
  args.num_kv_heads = 3;
  EXPECT_THROW(cpu::attention(args), Error);
  args = batch.attention_args(true);
  args.head_dim = 0;
  EXPECT_THROW(cpu::attention(args), Error);
  args = batch.attention_args(true);
  batch.sequences()[0].past_length = -1;
  EXPECT_THROW(cpu::attention(args), Error);
}

class AppendCase : public ::testing::TestWithParam<Case> {};

TEST_P(AppendCase, CopiesNewTokensBehindThePastAndTouchesNothingElse) {
  Batch batch(GetParam().heads, GetParam().lengths);
  std::vector<float> keys = batch.keys();
  std::vector<float> values = batch.values();
  const Heads& heads = batch.heads();
  for (const AttentionSequence& sequence : batch.sequences()) {
    for (std::int64_t i = 0; i < sequence.num_tokens; ++i) {
      for (std::int64_t e = 0; e < heads.kv_width(); ++e) {
        const std::int64_t row = (sequence.token_begin + i) * heads.row_width();
        const std::int64_t position =
            (sequence.slot * heads.num_kv_heads + e / heads.head_dim) * batch.capacity() +
            sequence.past_length + i;
        const std::int64_t element = position * heads.head_dim + e % heads.head_dim;
        keys[element] = batch.rows()[row + heads.query_width() + e];
        values[element] = batch.rows()[row + heads.query_width() + heads.kv_width() + e];
      }
    }
  }
  const ThreadScope threads(2);
  cpu::append_kv(batch.append_args());
  EXPECT_EQ(batch.keys(), keys);
  EXPECT_EQ(batch.values(), values);
}

INSTANTIATE_TEST_SUITE_P(Shapes, AppendCase,
                         ::testing::Values(Case{"one", {1, 1, 1}, {{1, 0}}},
                                           Case{"ragged", {9, 3, 7}, {{1, 20}, {0, 3}, {5, 0}}},
                                           Case{"prefill", {12, 12, 64}, {{70, 3}, {40, 0}}}),
                         [](const auto& info) { return info.param.name; });

TEST(AppendTest, RefusesWhatDoesNotFitBeforeAnythingIsCopied) {
  Batch batch({1, 1, 4}, {{1, 2}, {1, 5}});
  const std::vector<float> keys = batch.keys();
  batch.sequences()[1].past_length = batch.capacity();
  EXPECT_THROW(cpu::append_kv(batch.append_args()), Error);
  batch.sequences()[1].past_length = 0;
  batch.sequences()[1].slot = 2;
  EXPECT_THROW(cpu::append_kv(batch.append_args()), Error);
  EXPECT_EQ(batch.keys(), keys);
}

}  // namespace
}  // namespace moq::kernels
