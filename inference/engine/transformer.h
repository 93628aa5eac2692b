#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "inference/engine/aligned_buffer.h"
#include "inference/engine/kv_cache.h"
#include "inference/engine/model_spec.h"
#include "inference/engine/positions.h"
#include "inference/engine/token_batch.h"
#include "inference/engine/weights.h"
#include "inference/parallel/communicator.h"
#include "kernels/attention.h"
#include "kernels/linear.h"

namespace moq::inference {

/// One rank's part of a transformer: weights, workspace, and the forward pass.
///
/// All activations are float32, [num_tokens, ...] row-major in the workspace, which is allocated
/// once for `max_tokens` tokens. Every rank calls the same functions with the same arguments and
/// gets the same results. Not thread-safe; kernels run on the caller's ThreadScope.
class Transformer {
 public:
  Transformer(ModelSpec spec, Weights weights, std::shared_ptr<Communicator> communicator);

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return weights_; }
  Communicator& communicator() const { return *communicator_; }

  /// A cache for this rank's heads.
  KvCache make_cache(std::int64_t num_slots, std::int64_t capacity) const;

  /// What forward checks before it computes, of a batch that it may then get in parts.
  /// @throws moq::Error naming the first token that lies outside the vocabulary, position that the
  ///         model or the cache does not have, or slot that is not the sequence's own
  void check(const TokenBatch& batch, const KvCache* cache) const;

  /// Makes the workspace hold batches of `num_tokens` tokens; it never shrinks.
  void reserve(std::int64_t num_tokens);

  /// Runs the layers on a batch; hidden_state(), logits() and pooled() then give its results.
  /// @param cache  of a causal model; its slots receive the new tokens. Null for a bidirectional
  ///               model, or if the batch holds whole sequences that nothing is appended to
  /// @throws moq::Error as check()
  void forward(const TokenBatch& batch, KvCache* cache);

  /// The last layer's output after the final norm: [num_tokens, hidden_size], valid until the next
  /// forward.
  const float* hidden_state() const { return x_.as<float>(); }

  /// Logits of the given rows of the last forward: [rows.size(), vocab_size], valid until the next
  /// call.
  const float* logits(std::span<const std::int64_t> rows);

  /// activation(dense(first token)) of each sequence of the last forward's batch:
  /// [num_sequences, hidden_size].
  std::vector<float> pooled(const TokenBatch& batch);
  /// Classifier's logits of pooled outputs: [num_sequences, num_labels].
  std::vector<float> classify(std::span<const float> pooled) const;

 private:
  void embed(const TokenBatch& batch);
  void attend(const float* input, const Layer& layer, std::int64_t index, const TokenBatch& batch,
              KvCache* cache);
  void feed_forward(const float* input, const Layer& layer);
  void normalize(const float* input, const Norm& norm, float* output, std::int64_t rows) const;
  void normalize_heads(const Norm& norm, std::int64_t first_head, std::int64_t num_heads);
  void project(const float* input, const Linear& linear, float* output, std::int64_t rows,
               kernels::Activation activation = kernels::Activation::kNone) const;
  void project_and_add(const float* input, const Linear& linear);
  const float* shared_absmax(const float* input, const Linear& linear);
  void check(const TokenBatch& batch, const KvCache& cache) const;
  void prepare_positions(const TokenBatch& batch);

  std::int64_t q_heads() const { return weights_.heads.query_heads.size(); }
  std::int64_t kv_heads() const { return weights_.heads.kv_heads.size(); }
  std::int64_t qkv_width() const { return (q_heads() + 2 * kv_heads()) * spec_.head_dim; }

  ModelSpec spec_;
  Weights weights_;
  std::shared_ptr<Communicator> communicator_;

  RotationTable rotation_;
  std::vector<float> alibi_slopes_;                           ///< [this rank's query heads]
  std::vector<std::int64_t> table_rows_;                      ///< rows of the position table
  std::vector<kernels::AttentionSequence> packed_sequences_;  ///< attention without a cache

  // Workspace; rows are tokens.
  std::int64_t num_tokens_ = 0;  ///< of the last batch
  std::int64_t max_tokens_ = 0;
  std::int64_t max_logit_rows_ = 0;
  AlignedBuffer x_;            ///< [hidden_size], the residual stream
  AlignedBuffer normed_;       ///< [hidden_size]
  AlignedBuffer ffn_in_;       ///< [hidden_size], parallel residual only
  AlignedBuffer qkv_;          ///< [q | k | v]
  AlignedBuffer attended_;     ///< [query heads, head_dim]
  AlignedBuffer up_;           ///< [ffn columns], or [gate | up]
  AlignedBuffer gated_;        ///< [ffn columns]
  AlignedBuffer head_in_;      ///< [logit rows, hidden_size]
  AlignedBuffer logits_;       ///< [logit rows, this rank's vocabulary]
  at::Tensor shared_x_;        ///< x_ of the last batch's tokens, as ranks sum it
  std::vector<float> absmax_;  ///< of the rows that ranks share, for INT8 activations
  at::Tensor gathered_;        ///< [logit rows, vocab_size]
};

}  // namespace moq::inference
