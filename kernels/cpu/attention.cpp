#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

namespace moq::kernels::cpu {
namespace {

void check(const AppendKvArgs& args) {
  MOQ_CHECK(args.num_sequences >= 0, "append_kv: num_sequences must be >= 0, got ",
            args.num_sequences);
  MOQ_CHECK(args.num_kv_heads >= 1 && args.head_dim >= 1,
            "append_kv: num_kv_heads and head_dim must be >= 1, got ", args.num_kv_heads, " and ",
            args.head_dim);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    MOQ_CHECK(sequence.slot >= 0 && sequence.slot < args.num_slots,
              "append_kv: slot must be in [0, ", args.num_slots, "), got ", sequence.slot);
    MOQ_CHECK(sequence.num_tokens >= 0 && sequence.past_length >= 0 &&
                  sequence.past_length + sequence.num_tokens <= args.capacity,
              "append_kv: a sequence must fit into the cache's capacity of ", args.capacity,
              " positions, got ", sequence.num_tokens, " new tokens after ", sequence.past_length);
  }
}

void check(const AttentionArgs& args) {
  MOQ_CHECK(args.num_sequences >= 0, "attention: num_sequences must be >= 0, got ",
            args.num_sequences);
  MOQ_CHECK(args.num_kv_heads >= 1 && args.head_dim >= 1,
            "attention: num_kv_heads and head_dim must be >= 1, got ", args.num_kv_heads, " and ",
            args.head_dim);
  MOQ_CHECK(args.num_heads >= 1 && args.num_heads % args.num_kv_heads == 0,
            "attention: num_heads must be a multiple of num_kv_heads, got ", args.num_heads,
            " and ", args.num_kv_heads);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    MOQ_CHECK(sequence.num_tokens >= 0 && sequence.past_length >= 0 && sequence.slot >= 0,
              "attention: num_tokens, past_length and slot must be >= 0, got ", sequence.num_tokens,
              ", ", sequence.past_length, " and ", sequence.slot);
  }
}

/// One query head of one token.
void attend(const AttentionArgs& args, const AttentionSequence& sequence, std::int64_t token,
            std::int64_t head) {
  const std::int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const std::int64_t position = sequence.past_length + token;
  const std::int64_t num_keys =
      args.causal ? position + 1 : sequence.past_length + sequence.num_tokens;
  const std::int64_t row = sequence.token_begin + token;
  const float* query = args.query + row * args.query_stride + head * args.head_dim;
  float* output = args.output + row * args.output_stride + head * args.head_dim;
  const std::int64_t base = sequence.slot * args.slot_stride + kv_head * args.kv_head_stride;

  std::vector<float> scores(static_cast<std::size_t>(num_keys));
  float maximum = -std::numeric_limits<float>::infinity();
  for (std::int64_t j = 0; j < num_keys; ++j) {
    const float* key = args.keys + base + j * args.key_stride;
    float dot = 0.0F;
    for (std::int64_t d = 0; d < args.head_dim; ++d) {
      dot += query[d] * key[d];
    }
    float& score = scores[static_cast<std::size_t>(j)];
    score = args.scale * dot;
    if (args.alibi_slopes != nullptr) {
      score -= args.alibi_slopes[head] * static_cast<float>(std::abs(position - j));
    }
    maximum = std::max(maximum, score);
  }
  float sum = 0.0F;
  std::fill_n(output, args.head_dim, 0.0F);
  for (std::int64_t j = 0; j < num_keys; ++j) {
    const float* value = args.values + base + j * args.key_stride;
    const float weight = std::exp(scores[static_cast<std::size_t>(j)] - maximum);
    sum += weight;
    for (std::int64_t d = 0; d < args.head_dim; ++d) {
      output[d] += weight * value[d];
    }
  }
  for (std::int64_t d = 0; d < args.head_dim; ++d) {
    output[d] /= sum;
  }
}

}  // namespace

void append_kv(const AppendKvArgs& args) {
  check(args);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    parallel_for(sequence.num_tokens, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = (sequence.token_begin + i) * args.token_stride;
        for (std::int64_t h = 0; h < args.num_kv_heads; ++h) {
          const std::int64_t position =
              (sequence.slot * args.num_kv_heads + h) * args.capacity + sequence.past_length + i;
          std::copy_n(args.keys + row + h * args.head_dim, args.head_dim,
                      args.key_cache + position * args.head_dim);
          std::copy_n(args.values + row + h * args.head_dim, args.head_dim,
                      args.value_cache + position * args.head_dim);
        }
      }
    });
  }
}

void attention(const AttentionArgs& args) {
  check(args);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    parallel_for(sequence.num_tokens * args.num_heads, 1,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     attend(args, sequence, i / args.num_heads, i % args.num_heads);
                   }
                 });
  }
}

}  // namespace moq::kernels::cpu
