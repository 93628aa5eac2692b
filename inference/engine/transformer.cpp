#include "inference/engine/transformer.h"

#include <algorithm>

#include "inference/engine/positions.h"
#include "kernels/common/check.h"

namespace moq::inference {
namespace {

/// The first number that does not lie in [0, end), or null. end: at least 1.
const std::int64_t* first_outside(std::span<const std::int64_t> numbers, std::int64_t end) {
  const auto last = static_cast<std::uint64_t>(end) - 1;
  // The highest bit is that of the number's sign, or of what it lacks to the last one.
  const auto outside = [last](std::int64_t number) {
    return static_cast<std::uint64_t>(number) | (last - static_cast<std::uint64_t>(number));
  };
  const auto has_sign = [](std::uint64_t bits) { return static_cast<std::int64_t>(bits) < 0; };
  std::uint64_t any = 0;
  for (const std::int64_t number : numbers) {  // to the end: the compiler makes vectors of that
    any |= outside(number);
  }
  return has_sign(any)
             ? &*std::ranges::find_if(
                   numbers, [&](std::int64_t number) { return has_sign(outside(number)); })
             : nullptr;
}

}  // namespace

std::vector<float> Transformer::own_alibi_slopes() const {
  if (spec_.positions != PositionKind::kAlibi) {
    return {};
  }
  const std::vector<float> all = alibi_slopes(spec_.num_heads);
  const Range heads = weights_.heads.query_heads;
  return {all.begin() + heads.begin, all.begin() + heads.end};
}

void Transformer::check_row(std::int64_t row, std::int64_t num_tokens) const {
  MOQ_CHECK(row >= 0 && row < num_tokens, "engine: logits must be of one of the ", num_tokens,
            " tokens of the last forward, got ", row);
}

void Transformer::check(const TokenBatch& batch, const KvCache* cache) const {
  const std::int64_t num_types = std::max<std::int64_t>(spec_.num_token_types, 1);
  const std::int64_t* const token = first_outside(batch.token_ids(), spec_.vocab_size);
  MOQ_CHECK(token == nullptr, "engine: a token must lie in [0, ", spec_.vocab_size, "), got ",
            *token);
  const std::int64_t* const type = first_outside(batch.token_types(), num_types);
  MOQ_CHECK(type == nullptr, "engine: a token type must lie in [0, ", num_types, "), got ", *type);
  for (const kernels::AttentionSequence& sequence : batch.sequences()) {
    const std::int64_t length = sequence.past_length + sequence.num_tokens;
    MOQ_CHECK(length <= spec_.max_positions, "engine: a sequence must have at most ",
              spec_.max_positions, " tokens, got ", length);
    MOQ_CHECK(cache != nullptr || sequence.past_length == 0,
              "engine: tokens that continue a sequence need its KV cache, got none");
  }
  if (cache != nullptr) {
    check(batch, *cache);
  }
}

void Transformer::check(const TokenBatch& batch, const KvCache& cache) const {
  MOQ_CHECK(spec_.attention == AttentionKind::kCausal,
            "engine: a KV cache needs a causal model, got ", spec_.architecture);
  MOQ_CHECK(cache.num_layers() == spec_.num_layers && cache.num_kv_heads() == kv_heads() &&
                cache.head_dim() == spec_.head_dim,
            "engine: the KV cache must be one of this engine's make_cache, for ", spec_.num_layers,
            " layers, ", kv_heads(), " KV heads and head_dim ", spec_.head_dim, ", got one for ",
            cache.num_layers(), ", ", cache.num_kv_heads(), " and ", cache.head_dim());
  std::vector<bool> taken(static_cast<std::size_t>(cache.num_slots()), false);
  for (const kernels::AttentionSequence& sequence : batch.sequences()) {
    const std::int64_t past = cache.length(sequence.slot);
    MOQ_CHECK(past == sequence.past_length, "engine: new tokens must follow the ", past,
              " tokens of slot ", sequence.slot, ", got position ", sequence.past_length);
    MOQ_CHECK(past + sequence.num_tokens <= cache.capacity(),
              "engine: a sequence must fit into the KV cache's ", cache.capacity(),
              " positions, got ", past + sequence.num_tokens, " tokens in slot ", sequence.slot);
    MOQ_CHECK(!taken[static_cast<std::size_t>(sequence.slot)],
              "engine: the sequences of a batch must have a slot each, got slot ", sequence.slot,
              " twice");
    taken[static_cast<std::size_t>(sequence.slot)] = true;
  }
}

}  // namespace moq::inference
