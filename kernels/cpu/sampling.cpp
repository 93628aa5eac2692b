#include "kernels/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/common/philox.h"
#include "kernels/cpu/aligned_floats.h"
#include "kernels/cpu/simd/activation.h"

namespace moq::kernels {

void check(const SamplingParams& params) {
  MOQ_CHECK(params.temperature >= 0.0F && std::isfinite(params.temperature),
            "sample: temperature must be finite and >= 0, got ", params.temperature);
  MOQ_CHECK(params.top_k >= 0, "sample: top_k must be >= 0 (0: all tokens), got ", params.top_k);
  MOQ_CHECK(params.top_p > 0.0F && params.top_p <= 1.0F, "sample: top_p must be in (0, 1], got ",
            params.top_p);
  MOQ_CHECK(params.min_p >= 0.0F && params.min_p <= 1.0F, "sample: min_p must be in [0, 1], got ",
            params.min_p);
  MOQ_CHECK(params.repetition_penalty > 0.0F && std::isfinite(params.repetition_penalty),
            "sample: repetition_penalty must be finite and > 0, got ", params.repetition_penalty);
}

namespace cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void check(const SamplingArgs& args) {
  MOQ_CHECK(args.batch_size >= 0, "sample: batch_size must be >= 0, got ", args.batch_size);
  MOQ_CHECK(args.vocab_size >= 1, "sample: vocab_size must be >= 1, got ", args.vocab_size);
  MOQ_CHECK(args.tokens != nullptr || args.probabilities != nullptr,
            "sample: tokens or probabilities must be given, got neither");
  for (std::int64_t i = 0; i < args.batch_size; ++i) {
    const SamplingRow& row = args.rows[i];
    check(row.params);
    for (std::int64_t j = 0; j < row.history_length; ++j) {
      MOQ_CHECK(row.history[j] >= 0 && row.history[j] < args.vocab_size,
                "sample: history must hold tokens in [0, ", args.vocab_size, "), got ",
                row.history[j], " in row ", i);
    }
  }
}

/// The row's logits after the repetition penalty, copied to `storage` if there is one.
const float* penalised(const float* logits, std::int64_t vocab_size, const SamplingRow& row,
                       AlignedFloats& storage) {
  const float penalty = row.params.repetition_penalty;
  if (penalty == 1.0F || row.history_length == 0) {
    return logits;
  }
  storage = make_aligned_floats(vocab_size);
  std::copy_n(logits, vocab_size, storage.get());
  for (std::int64_t j = 0; j < row.history_length; ++j) {
    // From the logit, not from the score: a token counts once, however often it occurs.
    const float logit = logits[row.history[j]];
    storage[row.history[j]] = logit < 0.0F ? logit * penalty : logit / penalty;
  }
  return storage.get();
}

/// A number that orders floats by their own order, -0 before +0.
std::uint32_t ordered_key(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}

/// The top_k-th largest score, -infinity if every token is kept. Scores are counted by their
/// leading bits, so that only the few that share the k-th one's bits need to be ordered.
float top_k_threshold(const float* scores, std::int64_t vocab_size, std::int64_t top_k) {
  if (top_k == 0 || top_k >= vocab_size) {
    return -kInfinity;
  }
  constexpr int kShift = 20;
  std::vector<std::int64_t> counts(std::size_t{1} << (32 - kShift));
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    ++counts[ordered_key(scores[i]) >> kShift];
  }
  std::int64_t rest = top_k;
  std::size_t bucket = counts.size() - 1;
  while (counts[bucket] < rest) {
    rest -= counts[bucket--];
  }
  std::vector<float> candidates;
  candidates.reserve(static_cast<std::size_t>(counts[bucket]));
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    if (ordered_key(scores[i]) >> kShift == bucket) {
      candidates.push_back(scores[i]);
    }
  }
  const auto kth = candidates.begin() + (rest - 1);
  std::nth_element(candidates.begin(), kth, candidates.end(), std::greater<>());
  return *kth;
}

/// Sets the weights of all but the fewest tokens that together have top_p of the weight to zero.
/// Weights are summed by their leading bits; only those that share the last kept one's are ordered.
void keep_top_p(float* weights, std::int64_t vocab_size, float top_p) {
  constexpr int kShift = 16;
  const auto bucket_of = [](float weight) {
    return std::bit_cast<std::uint32_t>(weight) >> kShift;
  };
  std::vector<double> sums(bucket_of(1.0F) + 1);  // a weight is at most 1
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    sums[bucket_of(weights[i])] += static_cast<double>(weights[i]);
  }
  const double wanted = static_cast<double>(top_p) * std::accumulate(sums.begin(), sums.end(), 0.0);
  double before = 0.0;
  std::size_t bucket = sums.size() - 1;
  while (bucket > 0 && before + sums[bucket] < wanted) {
    before += sums[bucket--];
  }
  std::vector<std::int64_t> tied;  // tokens of the bucket in which the wanted weight is reached
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    if (bucket_of(weights[i]) == bucket) {
      tied.push_back(i);
    } else if (bucket_of(weights[i]) < bucket) {
      weights[i] = 0.0F;
    }
  }
  std::stable_sort(tied.begin(), tied.end(),
                   [&](std::int64_t a, std::int64_t b) { return weights[a] > weights[b]; });
  for (const std::int64_t token : tied) {
    const float weight = weights[token];
    if (before >= wanted) {
      weights[token] = 0.0F;
    }
    before += static_cast<double>(weight);
  }
}

/// Fills weights[vocab_size] with each token's probability relative to the most probable one's,
/// zero for those that are removed.
void weigh(const float* scores, std::int64_t vocab_size, float largest,
           const SamplingParams& params, float* weights) {
  if (params.temperature == 0.0F) {
    std::fill_n(weights, vocab_size, 0.0F);
    *(weights + (std::find(scores, scores + vocab_size, largest) - scores)) = 1.0F;
    return;
  }
  MOQ_DISPATCH_ISA(relative_weights, scores, weights, vocab_size, largest, params.temperature);
  const float threshold = top_k_threshold(scores, vocab_size, params.top_k);
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    weights[i] = scores[i] < threshold ? 0.0F : weights[i];
  }
  if (params.top_p < 1.0F) {
    keep_top_p(weights, vocab_size, params.top_p);
  }
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    weights[i] = weights[i] < params.min_p ? 0.0F : weights[i];
  }
}

/// Sum in float64, in eight interleaved sums that a compiler keeps in vectors.
double sum_of(const float* weights, std::int64_t size) {
  double sums[8]{};
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int part = 0; part < 8; ++part) {
      sums[part] += static_cast<double>(weights[i + part]);
    }
  }
  for (; i < size; ++i) {
    sums[0] += static_cast<double>(weights[i]);
  }
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

/// 53 random bits of the row's step, as a number in [0, 1).
double uniform(const SamplingRow& row) {
  const PhiloxBlock random =
      philox4x32({{static_cast<std::uint32_t>(row.step), static_cast<std::uint32_t>(row.step >> 32),
                   row.stream, 0}},
                 row.params.seed);
  const std::uint64_t bits = (static_cast<std::uint64_t>(random.word[0]) << 32) | random.word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

/// The first token at which the distribution function exceeds `quantile`.
std::int64_t draw(const float* weights, std::int64_t vocab_size, double quantile) {
  constexpr std::int64_t kBlock = 256;
  std::vector<double> blocks;
  for (std::int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    blocks.push_back(sum_of(weights + begin, std::min(kBlock, vocab_size - begin)));
  }
  // Below the total even where the product rounds up to it, so that a block exceeds the target.
  const double total = std::accumulate(blocks.begin(), blocks.end(), 0.0);
  const double target = std::min(quantile * total, std::nextafter(total, 0.0));
  double cumulative = 0.0;
  std::size_t block = 0;
  while (cumulative + blocks[block] <= target) {
    cumulative += blocks[block++];
  }
  // The block's own tokens, added one by one, may round to slightly less: then its last one it is.
  const auto begin = static_cast<std::int64_t>(block) * kBlock;
  const std::int64_t end = std::min(begin + kBlock, vocab_size);
  std::int64_t chosen = begin;
  for (std::int64_t i = begin; i < end && cumulative <= target; ++i) {
    if (weights[i] > 0.0F) {
      cumulative += static_cast<double>(weights[i]);
      chosen = i;
    }
  }
  return chosen;
}

void sample_row(const SamplingArgs& args, std::int64_t i) {
  const SamplingRow& row = args.rows[i];
  const std::int64_t n = args.vocab_size;
  AlignedFloats storage;
  const float* scores = penalised(args.logits + i * args.logits_stride, n, row, storage);
  const float largest = MOQ_DISPATCH_ISA(largest, scores, n);
  MOQ_CHECK(std::isfinite(largest), "sample: the largest logit must be finite, got ", largest,
            " in row ", i);
  if (row.params.temperature == 0.0F && args.probabilities == nullptr) {
    args.tokens[i] = std::find(scores, scores + n, largest) - scores;
    return;
  }
  const AlignedFloats weights = make_aligned_floats(n);
  weigh(scores, n, largest, row.params, weights.get());
  if (args.tokens != nullptr) {
    args.tokens[i] = draw(weights.get(), n, uniform(row));
  }
  if (args.probabilities != nullptr) {
    const double total = sum_of(weights.get(), n);
    std::transform(weights.get(), weights.get() + n, args.probabilities + i * n, [&](float weight) {
      return static_cast<float>(static_cast<double>(weight) / total);
    });
  }
}

}  // namespace

void sample(const SamplingArgs& args) {
  check(args);
  parallel_for(args.batch_size, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      sample_row(args, i);
    }
  });
}

}  // namespace cpu
}  // namespace moq::kernels
