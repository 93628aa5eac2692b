#include "inference/engine/token_batch.h"

#include "kernels/common/check.h"

namespace moq::inference {

void TokenBatch::clear() {
  token_ids_.clear();
  positions_.clear();
  token_types_.clear();
  sequences_.clear();
}

void TokenBatch::append(std::span<const std::int64_t> token_ids, std::int64_t slot,
                        std::int64_t past_length, std::span<const std::int64_t> token_types) {
  const auto count = static_cast<std::int64_t>(token_ids.size());
  MOQ_CHECK(token_types.empty() || token_types.size() == token_ids.size(),
            "engine: token_type_ids must be one per token, got ", token_types.size(), " for ",
            count);
  sequences_.push_back(
      {.token_begin = num_tokens(), .num_tokens = count, .slot = slot, .past_length = past_length});
  token_ids_.insert(token_ids_.end(), token_ids.begin(), token_ids.end());
  for (std::int64_t i = 0; i < count; ++i) {
    positions_.push_back(past_length + i);
    token_types_.push_back(token_types.empty() ? 0 : token_types[static_cast<std::size_t>(i)]);
  }
}

}  // namespace moq::inference
