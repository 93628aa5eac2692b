// What a forward pass on a GPU gives: hidden states, logits, pooled outputs.
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"

namespace moq::inference::cuda {

void CudaTransformer::hidden_state(const at::Tensor& out) {
  const OnDevice on_device(*this);
  normalize(workspace_.x, device_weights_.final_norm, out.mutable_data_ptr(), num_tokens_,
            /*rows=*/nullptr, /*float32_output=*/true);
}

/// Logits of rows of `input`, a part of x: of those that the device memory at `rows` names, or of
/// the first ones if it is null.
/// @param out  [count, vocab_size]
void CudaTransformer::run_head(const void* input, const std::int32_t* rows, const at::Tensor& out) {
  const std::int64_t count = out.size(0);
  kernels::DeviceNorm norm = device_weights_.final_norm;
  if (rows != nullptr) {
    normalize(input, norm, head_in_.mutable_data_ptr(), count, rows);
    input = head_in_.const_data_ptr();
    norm = {};
  }
  if (spec_.head_transform) {
    void* const transformed = head_in_[1].mutable_data_ptr();
    linear("head transform", input, norm, device_weights_.head_dense,
           {.m = count,
            .activation = spec_.activation,
            .output = transformed,
            .output_stride = spec_.hidden_size});
    input = transformed;
    norm = device_weights_.head_norm;
  }
  const at::Tensor& own = group_ ? own_logits_ : out;
  linear("head", input, norm, device_weights_.head,
         {.m = count,
          .output = own.mutable_data_ptr(),
          .output_stride = own.size(1),
          .float32_output = true});
  if (group_) {
    join_logits(out);
  }
}

/// Gathers every rank's share of the vocabulary, which may differ in width.
void CudaTransformer::join_logits(const at::Tensor& out) {
  const std::int64_t count = out.size(0);
  const std::int64_t widest = own_logits_.size(1);
  at::Tensor own = own_logits_.narrow(0, 0, count);
  at::Tensor all = at::from_blob(all_logits_.mutable_data_ptr(),
                                 {communicator_->size(), count, widest}, all_logits_.options());
  at::Tensor parts = all.view({communicator_->size() * count, widest});
  group_->all_gather(parts, own);
  std::int64_t column = 0;
  for (int rank = 0; rank < communicator_->size(); ++rank) {
    const std::int64_t width = weights_.vocab_widths[static_cast<std::size_t>(rank)];
    out.narrow(1, column, width).copy_(all[rank].narrow(1, 0, width));
    column += width;
  }
}

/// Of so many tokens in a row.
std::int64_t CudaTransformer::logit_rows_at_once(std::int64_t num_tokens) const {
  constexpr std::int64_t kFew = 64;
  return head_needs_room() ? std::min(kFew, num_tokens) : num_tokens;
}

void CudaTransformer::reserve_logits(std::int64_t num_tokens) {
  if (head_needs_room()) {
    const OnDevice on_device(*this);
    reserve_rows(logit_rows_at_once(num_tokens));
  }
}

void CudaTransformer::logits(const at::Tensor& out) {
  const std::int64_t at_once = logit_rows_at_once(num_tokens_);
  const OnDevice on_device(*this);
  for (std::int64_t begin = 0; begin < num_tokens_; begin += at_once) {
    const std::int64_t count = std::min(at_once, num_tokens_ - begin);
    run_head(x_[begin].const_data_ptr(), /*rows=*/nullptr, out.narrow(0, begin, count));
  }
}

void CudaTransformer::pooled(const TokenBatch& batch, const at::Tensor& out) {
  const auto count = static_cast<std::int64_t>(batch.sequences().size());
  const OnDevice on_device(*this);
  reserve_rows(count);
  normalize(workspace_.x, device_weights_.final_norm, head_in_.mutable_data_ptr(), count,
            last_inputs_->first_tokens());
  linear("pooler", head_in_.const_data_ptr(), {}, device_weights_.pooler,
         {.m = count,
          .activation = spec_.pooler_activation,
          .output = out.mutable_data_ptr(),
          .output_stride = spec_.hidden_size,
          .float32_output = true});
}

void CudaTransformer::classify(const at::Tensor& pooled, const at::Tensor& out) {
  const OnDevice on_device(*this);
  const at::Tensor input = pooled.to(scalar_type(dtype_));
  linear("classifier", input.const_data_ptr(), {}, device_weights_.classifier,
         {.m = pooled.size(0),
          .output = out.mutable_data_ptr(),
          .output_stride = spec_.num_labels,
          .float32_output = true});
}

}  // namespace moq::inference::cuda
