#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "inference/engine/token_batch.h"
#include "kernels/attention.h"
#include "kernels/sampling.h"

struct CUstream_st;

namespace moq::inference::cuda {

/// What a step reads besides weights and caches, in pinned memory and on the device: written here,
/// copied in one piece. The places don't change as long as the object lives, so that a captured
/// graph finds the next step's numbers where the last one's were.
class StepInputs {
 public:
  StepInputs(std::int64_t max_tokens, std::int64_t max_sequences, std::int64_t max_rows);

  std::int64_t max_tokens() const { return max_tokens_; }
  std::int64_t max_sequences() const { return max_sequences_; }
  std::int64_t max_rows() const { return max_rows_; }
  std::int64_t bytes() const { return host_.numel(); }

  /// Tokens, positions, types and sequences of a batch; sequences of one token come first.
  /// @returns the number of those
  std::int64_t write(const TokenBatch& batch);
  /// Fills up with tokens and sequences that nothing is computed for.
  void pad(std::int64_t num_tokens, std::int64_t num_sequences);
  /// The rows in the cache of the batch's tokens, to be written; -1 until then.
  std::span<std::int32_t> cache_rows() { return {host<std::int32_t>(kCacheRows), num_tokens_}; }
  /// Rows whose logits are computed, and what is drawn from them.
  void write_rows(std::span<const std::int64_t> rows);
  void write_sampling(std::span<const kernels::DeviceSamplingRow> rows);

  /// Copies all that was written to the device.
  void send(CUstream_st* stream) const;

  const std::int32_t* tokens() const { return device<std::int32_t>(kTokens); }
  const std::int32_t* positions() const { return device<std::int32_t>(kPositions); }
  const std::int32_t* token_types() const { return device<std::int32_t>(kTokenTypes); }
  const std::int32_t* device_cache_rows() const { return device<std::int32_t>(kCacheRows); }
  const kernels::DeviceSequence* sequences() const {
    return device<kernels::DeviceSequence>(kSequences);
  }
  /// The first token of each sequence, in the batch's order.
  const std::int32_t* first_tokens() const { return device<std::int32_t>(kFirstTokens); }
  const std::int32_t* rows() const { return device<std::int32_t>(kRows); }
  const kernels::DeviceSamplingRow* sampling() const {
    return device<kernels::DeviceSamplingRow>(kSampling);
  }

 private:
  enum Part : std::uint8_t {
    kTokens,
    kPositions,
    kTokenTypes,
    kCacheRows,
    kSequences,
    kFirstTokens,
    kRows,
    kSampling,
    kNumParts
  };

  template <typename T>
  T* host(Part part) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(host_.mutable_data_ptr()) + begin_[part]);
  }
  template <typename T>
  const T* device(Part part) const {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(device_.const_data_ptr()) +
                                      begin_[part]);
  }

  std::int64_t max_tokens_;
  std::int64_t max_sequences_;
  std::int64_t max_rows_;
  std::size_t num_tokens_ = 0;
  std::size_t num_sequences_ = 0;
  std::int64_t begin_[kNumParts] = {};  ///< bytes
  at::Tensor host_;                     ///< pinned
  at::Tensor device_;
};

}  // namespace moq::inference::cuda
