// What a forward pass on the CPU gives: hidden states, logits, pooled outputs, the next tokens.
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "inference/engine/cpu_transformer.h"
#include "kernels/sampling.h"

namespace moq::inference {

void CpuTransformer::hidden_state(const at::Tensor& out) {
  out.copy_(at::from_blob(x_.data(), {num_tokens_, spec_.hidden_size}, at::kFloat));
}

void CpuTransformer::logits(const at::Tensor& out) {
  constexpr std::int64_t kRowsAtOnce = 64;
  std::vector<std::int64_t> rows;
  for (std::int64_t begin = 0; begin < num_tokens_; begin += kRowsAtOnce) {
    rows.resize(static_cast<std::size_t>(std::min(kRowsAtOnce, num_tokens_ - begin)));
    std::iota(rows.begin(), rows.end(), begin);
    out.narrow(0, begin, static_cast<std::int64_t>(rows.size())).copy_(run_head(rows));
  }
}

/// Logits of the given rows, valid until the next call.
at::Tensor CpuTransformer::run_head(std::span<const std::int64_t> rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  const std::int64_t hidden = spec_.hidden_size;
  const std::int64_t width = weights_.head.shape().n;
  if (count > max_logit_rows_) {
    reserve_floats(head_in_, count * hidden * (spec_.head_transform ? 2 : 1));
    reserve_floats(logits_, count * width);
    max_logit_rows_ = count;
  }
  float* input = head_in_.as<float>();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = rows[static_cast<std::size_t>(i)];
    check_row(row, num_tokens_);
    std::memcpy(input + i * hidden, x_.as<float>() + row * hidden,
                sizeof(float) * static_cast<std::size_t>(hidden));
  }
  if (spec_.head_transform) {
    float* transformed = input + count * hidden;
    project(input, weights_.head_dense, transformed, count, spec_.activation);
    normalize(transformed, weights_.head_norm, input, count);
  }
  project(input, weights_.head, logits_.as<float>(), count);
  at::Tensor own = at::from_blob(logits_.data(), {count, width}, at::kFloat);
  if (communicator_->size() == 1) {
    return own;
  }
  communicator_->all_gather_columns_into(own, weights_.vocab_widths, gathered_);
  return gathered_;
}

void CpuTransformer::pooled(const TokenBatch& batch, const at::Tensor& out) {
  const std::int64_t hidden = spec_.hidden_size;
  const auto count = static_cast<std::int64_t>(batch.sequences().size());
  std::vector<float> first(static_cast<std::size_t>(count * hidden));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = batch.sequences()[static_cast<std::size_t>(i)].token_begin;
    std::memcpy(first.data() + i * hidden, x_.as<float>() + row * hidden,
                sizeof(float) * static_cast<std::size_t>(hidden));
  }
  project(first.data(), weights_.pooler, out.mutable_data_ptr<float>(), count,
          spec_.pooler_activation);
}

void CpuTransformer::classify(const at::Tensor& pooled, const at::Tensor& out) {
  project(pooled.const_data_ptr<float>(), weights_.classifier, out.mutable_data_ptr<float>(),
          pooled.size(0));
}

std::span<const std::int64_t> CpuTransformer::next_tokens(
    const TokenBatch& batch, KvCache& cache, std::span<const std::int64_t> rows,
    std::span<const kernels::SamplingRow> sampling) {
  forward(batch, &cache);
  drawn_.resize(rows.size());
  if (!rows.empty()) {
    const at::Tensor drawn_from = run_head(rows);
    kernels::cpu::sample({.logits = drawn_from.const_data_ptr<float>(),
                          .batch_size = drawn_from.size(0),
                          .vocab_size = spec_.vocab_size,
                          .logits_stride = spec_.vocab_size,
                          .rows = sampling.data(),
                          .tokens = drawn_.data()});
  }
  return drawn_;
}

}  // namespace moq::inference
