#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "inference/engine/kv_cache.h"
#include "inference/engine/model_spec.h"
#include "inference/engine/token_batch.h"
#include "inference/engine/weights.h"
#include "inference/parallel/communicator.h"
#include "kernels/common/check.h"
#include "kernels/sampling.h"

namespace moq::inference {

/// Memory that an engine holds on its device, in bytes.
struct MemoryReport {
  std::int64_t weights = 0;    ///< packed projections, tables, norms
  std::int64_t kv_cache = 0;   ///< of generate; a cache of make_cache belongs to its owner
  std::int64_t workspace = 0;  ///< activations, logits, tables of rotations, inputs of steps
};

/// A kernel of a step, for profiles.
struct KernelRecord {
  std::string what;   ///< "QKV projection"
  std::int64_t rows;  ///< tokens, or sequences
  std::int64_t columns;
  std::int64_t bytes;  ///< that it must read at least: weights, or keys and values
};

/// What a thread holds while it uses a device; it ends on the same thread.
class DeviceScope {
 public:
  virtual ~DeviceScope() = default;
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 protected:
  DeviceScope() = default;
};

/// One rank's part of a transformer: weights, workspace, and the forward pass, on one device.
///
/// Every rank calls the same functions with the same arguments and gets the same results. Not
/// thread-safe.
class Transformer {
 public:
  virtual ~Transformer() = default;
  Transformer(const Transformer&) = delete;
  Transformer& operator=(const Transformer&) = delete;

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return weights_; }
  Communicator& communicator() const { return *communicator_; }

  virtual at::Device device() const = 0;
  /// Keeps what the calling thread does on a GPU apart from CUDA graphs that this thread or others
  /// capture on other streams meanwhile. Any thread may ask. Null on the CPU.
  /// @throws moq::Error if the caller's current stream is being captured
  virtual std::unique_ptr<DeviceScope> outside_captures() const { return nullptr; }
  /// Makes the caller's current stream wait for the results of the calls within it at its end,
  /// instead of after each, so that none waits for the one before in a roundabout way. Null on the
  /// CPU.
  /// @throws moq::Error if that stream is being captured
  virtual std::unique_ptr<DeviceScope> in_one_go() { return nullptr; }
  /// What activations are kept in: "float32", "float16" or "bfloat16".
  virtual std::string compute_dtype() const = 0;
  /// What keys and values are kept in: the same, or "int8".
  virtual std::string kv_cache_dtype() const = 0;
  virtual MemoryReport memory() const = 0;
  /// Kernels of the last captured decode step, in their order; empty on the CPU.
  virtual std::vector<KernelRecord> decode_kernels() const { return {}; }

  /// Frees captured steps, which are captured anew when they are needed. They hold the ranks'
  /// communicator: NCCL does not end one before them.
  virtual void release_graphs() {}

  /// A cache for this rank's heads.
  virtual std::unique_ptr<KvCache> make_cache(std::int64_t num_slots, std::int64_t capacity) = 0;
  /// A cache for one generation, with no slot in use and at least the sizes asked for. The model
  /// keeps it, for the next generation too.
  virtual KvCache& generation_cache(std::int64_t num_slots, std::int64_t capacity) = 0;

  /// What forward checks before it computes, of a batch that it may then get in parts.
  /// @throws moq::Error naming the first token that lies outside the vocabulary, position that the
  ///         model or the cache does not have, or slot that is not the sequence's own
  void check(const TokenBatch& batch, const KvCache* cache) const;

  /// float32 memory on the model's device, for what is read on the caller's current stream.
  /// @throws moq::Error if there is not enough
  virtual at::Tensor new_result(at::IntArrayRef sizes) const = 0;

  /// Makes the workspace hold batches of `num_tokens` tokens; it never shrinks.
  virtual void reserve(std::int64_t num_tokens) = 0;
  /// Makes the room that logits() of such batches takes beside its result, if any.
  virtual void reserve_logits(std::int64_t /*num_tokens*/) {}

  /// Runs the layers on a batch; hidden_state(), logits() and pooled() then write its results to
  /// contiguous float32 memory on the model's device.
  /// @param cache  of a causal model; its slots receive the new tokens. Null for a bidirectional
  ///               model, or if the batch holds whole sequences that nothing is appended to
  /// @throws moq::Error as check()
  virtual void forward(const TokenBatch& batch, KvCache* cache) = 0;

  /// The last layer's output after the final norm: [num_tokens, hidden_size].
  virtual void hidden_state(const at::Tensor& out) = 0;

  /// Logits of the last forward's tokens: [num_tokens, vocab_size].
  virtual void logits(const at::Tensor& out) = 0;

  /// activation(dense(first token)) of each sequence of the last forward's batch:
  /// [num_sequences, hidden_size].
  virtual void pooled(const TokenBatch& batch, const at::Tensor& out) = 0;
  /// Classifier's logits of the pooled outputs of the last forward's batch:
  /// [num_sequences, num_labels].
  virtual void classify(const at::Tensor& pooled, const at::Tensor& out) = 0;

  /// One step of a generation: forward(), and the next token of some sequences.
  /// @param rows      tokens of the batch whose logits are drawn from, each the last of a sequence
  /// @param sampling  one for each of them
  /// @returns the drawn tokens, valid until the next call
  /// @throws moq::Error as check(), or if a row has a NaN, a +infinity or no logit above -infinity
  virtual std::span<const std::int64_t> next_tokens(
      const TokenBatch& batch, KvCache& cache, std::span<const std::int64_t> rows,
      std::span<const kernels::SamplingRow> sampling) = 0;

 protected:
  Transformer(ModelSpec spec, Weights weights, std::shared_ptr<Communicator> communicator)
      : spec_(std::move(spec)),
        weights_(std::move(weights)),
        communicator_(std::move(communicator)) {}

  std::int64_t q_heads() const { return weights_.heads.query_heads.size(); }
  std::int64_t kv_heads() const { return weights_.heads.kv_heads.size(); }
  std::int64_t qkv_width() const { return (q_heads() + 2 * kv_heads()) * spec_.head_dim; }
  /// Slopes of this rank's query heads; empty without ALiBi.
  std::vector<float> own_alibi_slopes() const;
  void check_row(std::int64_t row, std::int64_t num_tokens) const;
  /// The cache as one of this kind of device; null stays null.
  template <typename Cache>
  static Cache* own_cache(KvCache* cache) {
    auto* const own = dynamic_cast<Cache*>(cache);
    MOQ_CHECK((own == nullptr) == (cache == nullptr),
              "engine: the KV cache must be one of this engine's make_cache, got one of another ",
              "device");
    return own;
  }

  ModelSpec spec_;
  Weights weights_;
  std::shared_ptr<Communicator> communicator_;

 private:
  void check(const TokenBatch& batch, const KvCache& cache) const;
};

}  // namespace moq::inference
