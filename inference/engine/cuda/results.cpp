// What a forward pass on a GPU gives: hidden states, logits, pooled outputs.
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"

namespace moq::inference::cuda {

void CudaTransformer::hidden_state(const at::Tensor& out) {
  const OnDevice on_device(*this);
  normalize(workspace_.x, device_weights_.final_norm, out.mutable_data_ptr(), num_tokens_,
            /*rows=*/nullptr, /*float32_output=*/true);
}

/// logits_ (with several ranks joined_) of `count` rows of `input`, a part of x: of those that the
/// device memory at `rows` names, or of the first ones if it is null.
void CudaTransformer::run_head(const void* input, const std::int32_t* rows, std::int64_t count) {
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
  linear("head", input, norm, device_weights_.head,
         {.m = count,
          .output = logits_.mutable_data_ptr(),
          .output_stride = logits_.size(1),
          .float32_output = true});
  if (group_) {
    join_logits(count);
  }
}

/// Gathers every rank's share of the vocabulary, which may differ in width.
void CudaTransformer::join_logits(std::int64_t count) {
  const std::int64_t widest = logits_.size(1);
  at::Tensor own = logits_.narrow(0, 0, count);
  at::Tensor all = at::from_blob(all_logits_.mutable_data_ptr(),
                                 {communicator_->size(), count, widest}, all_logits_.options());
  at::Tensor parts = all.view({communicator_->size() * count, widest});
  group_->all_gather(parts, own);
  std::int64_t column = 0;
  for (int rank = 0; rank < communicator_->size(); ++rank) {
    const std::int64_t width = weights_.vocab_widths[static_cast<std::size_t>(rank)];
    joined_.narrow(0, 0, count).narrow(1, column, width).copy_(all[rank].narrow(1, 0, width));
    column += width;
  }
}

at::Tensor CudaTransformer::joined_logits(std::int64_t count) const {
  return (group_ ? joined_ : logits_).narrow(0, 0, count).narrow(1, 0, spec_.vocab_size);
}

void CudaTransformer::logits(std::span<const std::int64_t> rows, const at::Tensor& out) {
  const auto count = static_cast<std::int64_t>(rows.size());
  for (const std::int64_t row : rows) {
    check_row(row, num_tokens_);
  }
  const OnDevice on_device(*this);
  reserve_rows(count);
  const bool in_a_row = std::adjacent_find(rows.begin(), rows.end(), [](auto row, auto next) {
                          return next != row + 1;
                        }) == rows.end();
  if (in_a_row && count > 0) {
    run_head(x_[rows.front()].const_data_ptr(), nullptr, count);
  } else {
    run_head(workspace_.x, upload_rows(rows), count);
  }
  out.copy_(joined_logits(count));
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

/// Row numbers on the device, until the next call.
const std::int32_t* CudaTransformer::upload_rows(std::span<const std::int64_t> rows) {
  const std::vector<std::int32_t> narrow(rows.begin(), rows.end());
  uploaded_rows_ = upload(narrow, "the workspace");
  return static_cast<const std::int32_t*>(uploaded_rows_.const_data_ptr());
}

}  // namespace moq::inference::cuda
