#include "inference/engine/token_batch.h"

#include <numeric>

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
  positions_.resize(token_ids_.size());
  std::iota(positions_.end() - count, positions_.end(), past_length);
  token_types_.insert(token_types_.end(), token_types.begin(), token_types.end());
  token_types_.resize(token_ids_.size(), 0);
}

}  // namespace moq::inference
