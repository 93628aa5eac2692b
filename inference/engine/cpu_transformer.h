#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "inference/engine/aligned_buffer.h"
#include "inference/engine/positions.h"
#include "inference/engine/transformer.h"
#include "kernels/attention.h"
#include "kernels/linear.h"

namespace moq::inference {

/// A transformer on the CPU. All activations are float32, [num_tokens, ...] row-major in the
/// workspace. Kernels run on the caller's ThreadScope.
class CpuTransformer final : public Transformer {
 public:
  CpuTransformer(ModelSpec spec, Weights weights, std::shared_ptr<Communicator> communicator);

  at::Device device() const override { return at::kCPU; }
  std::string compute_dtype() const override { return "float32"; }
  std::string kv_cache_dtype() const override { return "float32"; }
  MemoryReport memory() const override;
  std::unique_ptr<KvCache> make_cache(std::int64_t num_slots, std::int64_t capacity) override;
  KvCache& generation_cache(std::int64_t num_slots, std::int64_t capacity) override;
  at::Tensor new_result(at::IntArrayRef sizes) const override;
  void reserve(std::int64_t num_tokens) override;
  void forward(const TokenBatch& batch, KvCache* any_cache) override;
  void hidden_state(const at::Tensor& out) override;
  void logits(const at::Tensor& out) override;
  void pooled(const TokenBatch& batch, const at::Tensor& out) override;
  void classify(const at::Tensor& pooled, const at::Tensor& out) override;
  std::span<const std::int64_t> next_tokens(
      const TokenBatch& batch, KvCache& cache, std::span<const std::int64_t> rows,
      std::span<const kernels::SamplingRow> sampling) override;

 private:
  void embed(const TokenBatch& batch);
  void attend(const float* input, const Layer& layer, std::int64_t index, const TokenBatch& batch,
              HostKvCache* cache);
  void feed_forward(const float* input, const Layer& layer);
  void normalize(const float* input, const Norm& norm, float* output, std::int64_t rows) const;
  void normalize_heads(const Norm& norm, std::int64_t first_head, std::int64_t num_heads);
  void project(const float* input, const Linear& linear, float* output, std::int64_t rows,
               kernels::Activation activation = kernels::Activation::kNone) const;
  void project_and_add(const float* input, const Linear& linear);
  const float* shared_extents(const float* input, const Linear& linear);
  at::Tensor run_head(std::span<const std::int64_t> rows);
  void prepare_positions(const TokenBatch& batch);

  RotationTable rotation_;
  std::vector<float> alibi_slopes_;                           ///< [this rank's query heads]
  std::vector<std::int64_t> table_rows_;                      ///< rows of the position table
  std::vector<kernels::AttentionSequence> packed_sequences_;  ///< attention without a cache
  std::unique_ptr<KvCache> generation_cache_;
  std::vector<std::int64_t> drawn_;

  // Workspace; rows are tokens.
  std::int64_t num_tokens_ = 0;  ///< of the last batch
  std::int64_t max_tokens_ = 0;
  std::int64_t max_logit_rows_ = 0;
  AlignedBuffer x_;             ///< [hidden_size], the residual stream
  AlignedBuffer normed_;        ///< [hidden_size]
  AlignedBuffer ffn_in_;        ///< [hidden_size], parallel residual only
  AlignedBuffer qkv_;           ///< [q | k | v]
  AlignedBuffer attended_;      ///< [query heads, head_dim]
  AlignedBuffer up_;            ///< [ffn columns], or [gate | up]
  AlignedBuffer gated_;         ///< [ffn columns]
  AlignedBuffer head_in_;       ///< [logit rows, hidden_size]
  AlignedBuffer logits_;        ///< [logit rows, this rank's vocabulary]
  at::Tensor shared_x_;         ///< x_ of the last batch's tokens, as ranks sum it
  std::vector<float> extents_;  ///< of the rows that ranks share, for INT8 activations
  at::Tensor gathered_;         ///< [logit rows, vocab_size]
};

}  // namespace moq::inference
