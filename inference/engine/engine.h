#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "inference/engine/generator.h"
#include "inference/engine/transformer.h"

namespace moq::inference {

struct EngineOptions {
  std::optional<std::string> dtype;        ///< "int8", "fp32", "fp16", "bf16"; nullopt: as stored
  std::optional<bool> quantize_head;       ///< LoadOptions::quantize_head
  std::optional<std::string> activations;  ///< "dynamic"; nullopt: exact, or as the checkpoint asks
  std::optional<std::filesystem::path> policy;  ///< a user's policy (JSON); nullopt: a built-in one
  std::shared_ptr<Communicator> communicator;   ///< null: single_process()
};

/// Token ids of one sequence; token types are one per id, or empty.
struct TokenSequence {
  std::vector<std::int64_t> token_ids;
  std::vector<std::int64_t> token_types;
};

/// What an encoder computes, float32. Tokens of all sequences are packed in order.
struct Encoding {
  at::Tensor last_hidden_state;  ///< [num_tokens, hidden_size]
  at::Tensor pooled;             ///< [num_sequences, hidden_size]; undefined without a pooler
  at::Tensor logits;             ///< [num_sequences, num_labels]; undefined without a classifier
};

/// A model of a checkpoint directory, ready to run on the CPU with torch's number of threads.
class Engine {
 public:
  /// @throws moq::Error if the directory, its config.json, the policy or an option is unsuitable
  static Engine open(const std::filesystem::path& directory, const EngineOptions& options);

  const ModelSpec& spec() const { return model_.spec(); }
  const Transformer& model() const { return model_; }
  const std::string& policy_name() const { return policy_name_; }
  std::string activations() const;    ///< "dynamic" if any layer reads INT8, or "weight_only"
  std::string weight_format() const;  ///< of the layers' projections
  std::string head_format() const;    ///< of the language-model head; empty without one

  /// As inference::generate; the seed of rank 0 counts.
  GenerationResult generate(std::span<const std::vector<std::int64_t>> prompts,
                            GenerationOptions options, const OnToken& on_token = {});

  /// Logits of every token of the sequences, packed: [num_tokens, vocab_size], float32.
  /// @param cache  null: whole sequences. Otherwise sequence i continues slots[i]
  at::Tensor forward(std::span<const TokenSequence> sequences, KvCache* cache,
                     std::span<const std::int64_t> slots);

  Encoding encode(std::span<const TokenSequence> sequences);

  KvCache make_cache(std::int64_t num_slots, std::int64_t capacity) const;

 private:
  Engine(Transformer model, std::string policy_name)
      : model_(std::move(model)), policy_name_(std::move(policy_name)) {}
  void run(std::span<const TokenSequence> sequences, KvCache* cache,
           std::span<const std::int64_t> slots);

  Transformer model_;
  std::string policy_name_;
  TokenBatch batch_;
};

}  // namespace moq::inference
