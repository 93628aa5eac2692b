#include "inference/engine/cuda/step_inputs.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

#include "inference/engine/cuda/device_memory.h"
#include "kernels/cuda/host_copy.h"

namespace moq::inference::cuda {
namespace {

constexpr std::int64_t kAlignment = 16;
constexpr std::int32_t kNoRow = -1;

void narrow(std::span<const std::int64_t> from, std::int32_t* to) {
  std::transform(from.begin(), from.end(), to,
                 [](std::int64_t value) { return static_cast<std::int32_t>(value); });
}

}  // namespace

StepInputs::StepInputs(std::int64_t max_tokens, std::int64_t max_sequences, std::int64_t max_rows)
    : max_tokens_(max_tokens), max_sequences_(max_sequences), max_rows_(max_rows) {
  std::int64_t end = 0;
  const auto place = [&](Part part, std::int64_t count, std::size_t element) {
    begin_[part] = end;
    end += (count * static_cast<std::int64_t>(element) + kAlignment - 1) / kAlignment * kAlignment;
  };
  for (const Part part : {kTokens, kPositions, kTokenTypes, kCacheRows}) {
    place(part, max_tokens, sizeof(std::int32_t));
  }
  place(kSequences, max_sequences, sizeof(kernels::DeviceSequence));
  place(kFirstTokens, max_sequences, sizeof(std::int32_t));
  place(kRows, max_rows, sizeof(std::int32_t));
  place(kSampling, max_rows, sizeof(kernels::DeviceSamplingRow));
  host_ = at::zeros({end}, at::TensorOptions(at::kByte).pinned_memory(true));
  device_ = allocate(end, "the workspace");
}

std::int64_t StepInputs::write(const TokenBatch& batch) {
  num_tokens_ = batch.token_ids().size();
  num_sequences_ = batch.sequences().size();
  narrow(batch.token_ids(), host<std::int32_t>(kTokens));
  narrow(batch.positions(), host<std::int32_t>(kPositions));
  narrow(batch.token_types(), host<std::int32_t>(kTokenTypes));
  std::fill_n(host<std::int32_t>(kCacheRows), num_tokens_, kNoRow);
  auto* const sequences = host<kernels::DeviceSequence>(kSequences);
  const auto device_sequence = [](const kernels::AttentionSequence& sequence) {
    return kernels::DeviceSequence{.token_begin = static_cast<std::int32_t>(sequence.token_begin),
                                   .num_tokens = static_cast<std::int32_t>(sequence.num_tokens),
                                   .past_length = static_cast<std::int32_t>(sequence.past_length),
                                   .slot = static_cast<std::int32_t>(sequence.slot)};
  };
  std::transform(batch.sequences().begin(), batch.sequences().end(), sequences, device_sequence);
  std::transform(sequences, sequences + num_sequences_, host<std::int32_t>(kFirstTokens),
                 [](const kernels::DeviceSequence& sequence) { return sequence.token_begin; });
  const auto* const longer = std::stable_partition(
      sequences, sequences + num_sequences_,
      [](const kernels::DeviceSequence& sequence) { return sequence.num_tokens == 1; });
  return longer - sequences;
}

void StepInputs::pad(std::int64_t num_tokens, std::int64_t num_sequences) {
  const auto padding = static_cast<std::size_t>(num_tokens) - num_tokens_;
  for (const Part part : {kTokens, kPositions, kTokenTypes}) {
    std::fill_n(host<std::int32_t>(part) + num_tokens_, padding, 0);
  }
  std::fill_n(host<std::int32_t>(kCacheRows) + num_tokens_, padding, kNoRow);
  std::fill(host<kernels::DeviceSequence>(kSequences) + num_sequences_,
            host<kernels::DeviceSequence>(kSequences) + num_sequences, kernels::DeviceSequence{});
}

void StepInputs::write_rows(std::span<const std::int64_t> rows) {
  narrow(rows, host<std::int32_t>(kRows));
}

void StepInputs::write_sampling(std::span<const kernels::DeviceSamplingRow> rows) {
  std::copy(rows.begin(), rows.end(), host<kernels::DeviceSamplingRow>(kSampling));
}

void StepInputs::send(CUstream_st* stream) const {
  kernels::cuda::copy_from_host(device_.mutable_data_ptr(), host_.const_data_ptr(),
                                static_cast<std::size_t>(host_.numel()), stream);
}

}  // namespace moq::inference::cuda
