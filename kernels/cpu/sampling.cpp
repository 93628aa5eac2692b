#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/common/philox.h"

namespace moq::kernels::cpu {
namespace {

/// A token that may still be drawn; its weight is exp(score - largest score), in (0, 1].
struct Candidate {
  float weight;
  std::int32_t token;
};

/// Larger weight first, then lower index.
bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

bool precedes(const Candidate& a, const Candidate& b) {
  return a.token < b.token;
}

double total_weight(const std::vector<Candidate>& candidates) {
  double total = 0.0;
  for (const Candidate& candidate : candidates) {
    total += static_cast<double>(candidate.weight);
  }
  return total;
}

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

void check(const SamplingArgs& args) {
  MOQ_CHECK(args.batch_size >= 0, "sample: batch_size must be >= 0, got ", args.batch_size);
  MOQ_CHECK(args.vocab_size >= 1 && args.vocab_size <= std::numeric_limits<std::int32_t>::max(),
            "sample: vocab_size must be in [1, 2^31), got ", args.vocab_size);
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
                       std::vector<float>& storage) {
  const float penalty = row.params.repetition_penalty;
  if (penalty == 1.0F || row.history_length == 0) {
    return logits;
  }
  storage.assign(logits, logits + vocab_size);
  for (std::int64_t j = 0; j < row.history_length; ++j) {
    // From the logit, not from the score: a token counts once, however often it occurs.
    const float logit = logits[row.history[j]];
    storage[static_cast<std::size_t>(row.history[j])] =
        logit < 0.0F ? logit * penalty : logit / penalty;
  }
  return storage.data();
}

/// Lowest index of the largest score.
std::int64_t argmax(const float* scores, std::int64_t vocab_size) {
  std::int64_t best = 0;
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    MOQ_CHECK(!std::isnan(scores[i]), "sample: logits must not be NaN, got one for token ", i);
    if (scores[i] > scores[best]) {
      best = i;
    }
  }
  MOQ_CHECK(std::isfinite(scores[best]), "sample: the largest logit must be finite, got ",
            scores[best]);
  return best;
}

/// The top_k-th largest score, -infinity if every token is kept.
float top_k_threshold(const float* scores, std::int64_t vocab_size, std::int64_t top_k) {
  if (top_k == 0 || top_k >= vocab_size) {
    return -std::numeric_limits<float>::infinity();
  }
  std::vector<float> order(scores, scores + vocab_size);
  const auto kth = order.begin() + (top_k - 1);
  std::nth_element(order.begin(), kth, order.end(), std::greater<>());
  return *kth;
}

/// Tokens whose score reaches `threshold` and whose weight is not zero, in index order.
std::vector<Candidate> collect(const float* scores, std::int64_t vocab_size, float largest,
                               float threshold, float temperature) {
  std::vector<Candidate> candidates;
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    if (scores[i] >= threshold) {
      const float weight = std::exp((scores[i] - largest) / temperature);
      if (weight > 0.0F) {
        candidates.push_back({weight, static_cast<std::int32_t>(i)});
      }
    }
  }
  return candidates;
}

/// Reduces candidates to the fewest that together have top_p of the weight, in rank order.
void keep_top_p(std::vector<Candidate>& candidates, float top_p) {
  const double total = total_weight(candidates);
  const double wanted = static_cast<double>(top_p) * total;
  // n tokens of weight <= w have at most n * w together: below this bound a token lies in the tail
  // that is cut off, wherever it ranks. Most of a vocabulary is dropped before anything is sorted.
  const double bound = (total - wanted) / static_cast<double>(candidates.size());
  std::erase_if(candidates,
                [&](const Candidate& c) { return static_cast<double>(c.weight) < bound; });
  double before = 0.0;
  std::size_t sorted = 0;
  for (std::size_t kept = 0; kept < candidates.size(); ++kept) {
    if (kept == sorted) {  // rank the next stretch, four times as long as all before it
      sorted = std::min(candidates.size(), std::max<std::size_t>(64, 5 * sorted));
      const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(kept);
      const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(sorted);
      std::nth_element(first, last - 1, candidates.end(), ranks_before);
      std::sort(first, last, ranks_before);
    }
    if (kept > 0 && before >= wanted) {
      candidates.resize(kept);
      return;
    }
    before += static_cast<double>(candidates[kept].weight);
  }
}

/// The distribution of a row that is not greedy, in index order.
std::vector<Candidate> distribution(const float* scores, std::int64_t vocab_size,
                                    const SamplingParams& params) {
  const float largest = scores[argmax(scores, vocab_size)];
  const float threshold = top_k_threshold(scores, vocab_size, params.top_k);
  std::vector<Candidate> kept = collect(scores, vocab_size, largest, threshold, params.temperature);
  if (params.top_p < 1.0F) {
    keep_top_p(kept, params.top_p);
    std::sort(kept.begin(), kept.end(), precedes);
  }
  // The largest weight is 1 and always kept: weights are shares of the largest probability already.
  std::erase_if(kept, [&](const Candidate& c) { return c.weight < params.min_p; });
  return kept;
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
std::int64_t draw(const std::vector<Candidate>& candidates, double quantile) {
  const double target = quantile * total_weight(candidates);
  double cumulative = 0.0;
  for (const Candidate& candidate : candidates) {
    cumulative += static_cast<double>(candidate.weight);
    if (cumulative > target) {
      return candidate.token;
    }
  }
  return candidates.back().token;
}

void sample_row(const SamplingArgs& args, std::int64_t i) {
  const SamplingRow& row = args.rows[i];
  std::vector<float> storage;
  const float* scores =
      penalised(args.logits + i * args.logits_stride, args.vocab_size, row, storage);
  std::vector<Candidate> candidates;
  if (row.params.temperature == 0.0F) {
    candidates.push_back({1.0F, static_cast<std::int32_t>(argmax(scores, args.vocab_size))});
  } else {
    candidates = distribution(scores, args.vocab_size, row.params);
  }
  if (args.tokens != nullptr) {
    args.tokens[i] = draw(candidates, uniform(row));
  }
  if (args.probabilities != nullptr) {
    float* probabilities = args.probabilities + i * args.vocab_size;
    std::fill_n(probabilities, args.vocab_size, 0.0F);
    const double total = total_weight(candidates);
    for (const Candidate& candidate : candidates) {
      probabilities[candidate.token] =
          static_cast<float>(static_cast<double>(candidate.weight) / total);
    }
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

}  // namespace moq::kernels::cpu
