#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"

namespace moq::inference {

/// New tokens of several sequences, packed one after the other: no padding exists, so that a row of
/// a batch is computed as it would be alone.
class TokenBatch {
 public:
  void clear();
  /// Appends a sequence's next tokens.
  /// @param slot         of the KV cache; anything if there is none
  /// @param past_length  tokens of the sequence before these
  /// @param token_types  one per token, or empty: all 0
  void append(std::span<const std::int64_t> token_ids, std::int64_t slot, std::int64_t past_length,
              std::span<const std::int64_t> token_types = {});

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(token_ids_.size()); }
  std::span<const std::int64_t> token_ids() const { return token_ids_; }
  std::span<const std::int64_t> positions() const { return positions_; }
  std::span<const std::int64_t> token_types() const { return token_types_; }
  std::span<const kernels::AttentionSequence> sequences() const { return sequences_; }

 private:
  std::vector<std::int64_t> token_ids_;
  std::vector<std::int64_t> positions_;
  std::vector<std::int64_t> token_types_;
  std::vector<kernels::AttentionSequence> sequences_;
};

}  // namespace moq::inference
