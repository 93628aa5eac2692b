#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "inference/engine/generator.h"
#include "inference/engine/transformer.h"

namespace moq::inference {

struct EngineOptions {
  std::optional<std::string> dtype;   ///< "int8", "fp32", "fp16", "bf16"; nullopt: as stored
  std::optional<bool> quantize_head;  ///< LoadOptions::quantize_head
  std::optional<std::string>
      compute_dtype;  ///< "fp32", "fp16", "bf16"; nullopt: the device's choice
  std::optional<std::string> kv_cache_dtype;  ///< "int8"; nullopt: as compute_dtype
  at::Device device = at::kCPU;
  /// "dynamic" or "dynamic_asymmetric"; nullopt: exact, or as the checkpoint asks
  std::optional<std::string> activations;
  std::optional<std::filesystem::path> policy;  ///< a user's policy (JSON); nullopt: a built-in one
  /// Several ranks on GPUs: the process group, registered with c10d, that carries GPU tensors.
  std::string device_group;
  std::shared_ptr<Communicator> communicator;  ///< null: single_process()
};

/// Token ids of one sequence; token types are one per id, or empty. Both are the caller's memory,
/// which is read until the call ends.
struct TokenSequence {
  std::span<const std::int64_t> token_ids;
  std::span<const std::int64_t> token_types;
};

/// What an encoder computes, float32, on the engine's device. Tokens of all sequences are packed in
/// order.
struct Encoding {
  at::Tensor last_hidden_state;  ///< [num_tokens, hidden_size]
  at::Tensor pooled;             ///< [num_sequences, hidden_size]; undefined without a pooler
  at::Tensor logits;             ///< [num_sequences, num_labels]; undefined without a classifier
};

/// A model of a checkpoint directory, ready to run on a GPU, or on the CPU with torch's number of
/// threads.
///
/// Any thread may call; a call waits until the one before it has ended. On a GPU this or other
/// threads may capture CUDA graphs meanwhile, but not of the caller's current stream. Where several
/// ranks share the model, their calls must come in the same order on all of them. A callback of
/// generate that calls the engine that runs it gets an error.
class Engine {
 public:
  /// @throws moq::Error if the directory, its config.json, the policy or an option is unsuitable
  static Engine open(const std::filesystem::path& directory, const EngineOptions& options);

  const ModelSpec& spec() const { return model_->spec(); }
  const Transformer& model() const { return *model_; }
  /// Transformer::outside_captures, for what a caller does around a call.
  std::unique_ptr<DeviceScope> outside_captures() const { return model_->outside_captures(); }
  /// Transformer::memory and decode_kernels, between calls.
  MemoryReport memory() const;
  std::vector<KernelRecord> decode_kernels() const;
  std::shared_ptr<Communicator> communicator() const { return communicator_; }
  const std::string& policy_name() const { return policy_name_; }
  /// "dynamic", "static", "dynamic_asymmetric" or "static_asymmetric", the first of which any layer
  /// reads INT8 so, or "weight_only".
  std::string activations() const;
  std::string weight_format() const;  ///< of the layers' projections
  std::string head_format() const;    ///< of the language-model head; empty without one

  /// As inference::generate; the seed of rank 0 counts.
  GenerationResult generate(std::span<const std::vector<std::int64_t>> prompts,
                            GenerationOptions options, const OnToken& on_token = {});

  /// Logits of every token of the sequences, packed: [num_tokens, vocab_size], float32,
  /// on the engine's device.
  /// @param cache  null: whole sequences. Otherwise sequence i continues slots[i]
  at::Tensor forward(std::span<const TokenSequence> sequences, KvCache* cache,
                     std::span<const std::int64_t> slots);

  /// Transformer::release_graphs, between calls.
  void release_graphs();

  Encoding encode(std::span<const TokenSequence> sequences);

  /// All ranks make one together.
  std::unique_ptr<KvCache> make_cache(std::int64_t num_slots, std::int64_t capacity);

 private:
  /// Who calls; on the heap, because an engine moves.
  struct Use {
    std::mutex mutex;
    std::atomic<std::thread::id> holder;
  };
  class Call;

  Engine(std::unique_ptr<Transformer> model, std::string policy_name,
         std::shared_ptr<Communicator> communicator)
      : model_(std::move(model)),
        policy_name_(std::move(policy_name)),
        communicator_(std::move(communicator)) {}
  at::Tensor new_result(at::IntArrayRef sizes) const;
  template <typename MakeRoom, typename OnPiece>
  void run(std::span<const TokenSequence> sequences, KvCache* cache,
           std::span<const std::int64_t> slots, bool with_logits, const MakeRoom& make_room,
           const OnPiece& on_piece);

  std::unique_ptr<Use> in_use_ = std::make_unique<Use>();
  std::unique_ptr<Transformer> model_;
  std::string policy_name_;
  std::shared_ptr<Communicator> communicator_;
  TokenBatch all_;    ///< of a call
  TokenBatch batch_;  ///< the piece of it that runs
};

}  // namespace moq::inference
