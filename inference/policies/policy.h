#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "inference/checkpoint/json.h"
#include "inference/engine/model_spec.h"
#include "inference/parallel/reshard.h"

/// A policy tells how one architecture of Hugging Face becomes a ModelSpec: which key of
/// config.json fills which field, and which parameter is which module. Policies are tables; the
/// code that reads them knows no architecture.
namespace moq::inference {

/// The places of a transformer that hold parameters. "Per layer" ones exist once a layer.
enum class Module : std::uint8_t {
  kTokenEmbedding,      ///< [vocab_size, hidden_size]
  kPositionEmbedding,   ///< [max_positions + position_offset, hidden_size]
  kTokenTypeEmbedding,  ///< [num_token_types, hidden_size]
  kEmbeddingNorm,       ///< [hidden_size]
  kAttentionNorm,       ///< per layer, [hidden_size]
  kQkv,                 ///< per layer: kQuery, kKey and kValue in one parameter
  kQuery,               ///< per layer, [num_heads * head_dim, hidden_size]
  kKey,                 ///< per layer, [num_kv_heads * head_dim, hidden_size]
  kValue,               ///< as kKey
  kQueryNorm,           ///< per layer, [head_dim]
  kKeyNorm,             ///< as kQueryNorm
  kAttentionOut,        ///< per layer, [hidden_size, num_heads * head_dim]
  kFfnNorm,             ///< per layer, [hidden_size]
  kGateUp,              ///< per layer: kGate, then kUp, in one parameter
  kGate,                ///< per layer, [intermediate_size, hidden_size]
  kUp,                  ///< as kGate
  kDown,                ///< per layer, [hidden_size, intermediate_size]
  kFinalNorm,           ///< [hidden_size]
  kHeadDense,           ///< [hidden_size, hidden_size], before the head (masked language models)
  kHeadNorm,            ///< [hidden_size], after kHeadDense
  kHead,                ///< [vocab_size, hidden_size]
  kPooler,              ///< [hidden_size, hidden_size]
  kClassifier,          ///< [num_labels, hidden_size]
};

/// How a weight matrix lies in the checkpoint.
enum class WeightLayout : std::uint8_t {
  kOutIn,  ///< torch's Linear
  kInOut,  ///< Hugging Face's Conv1D (GPT-2)
};

/// Where a module's parameters are: `name` + ".weight" (or the parts of a quantized weight) and
/// `name` + ".bias". A norm's may also be `name` + ".gamma" and ".beta", as TensorFlow wrote them.
struct ModuleRule {
  Module module{};
  std::string name = {};  ///< "{layer}" stands for the layer's number
  WeightLayout layout = WeightLayout::kOutIn;
  QkvOrder order = QkvOrder::kConcatenated;  ///< of a fused projection
  bool in_body = true;                       ///< the name carries the policy's prefix
};

/// A field of ModelSpec that a table may name.
using SpecField =
    std::variant<std::int64_t ModelSpec::*, double ModelSpec::*, bool ModelSpec::*,
                 NormKind ModelSpec::*, NormPlace ModelSpec::*, AttentionKind ModelSpec::*,
                 PositionKind ModelSpec::*, kernels::RotaryScaling ModelSpec::*,
                 kernels::Activation ModelSpec::*>;

/// The key of config.json that fills a field: the first of `keys` that is present and not null.
/// A dot descends into an object. Without one the field keeps the value of Policy::traits.
struct ConfigRule {
  SpecField field;
  std::vector<std::string> keys;
};

/// A key of config.json that must have one value (or be absent or null), because the engine
/// computes nothing else.
struct RequiredValue {
  std::string key;
  checkpoint::Json value;
};

/// A flag of the spec that says whether the checkpoint holds a module.
struct PresenceRule {
  bool ModelSpec::*flag;
  Module module;
};

struct Policy {
  std::string name = {};
  std::vector<std::string> architectures = {};  ///< as in config.json's "architectures"
  ModelSpec traits = {};                        ///< what the family fixes, and defaults of the rest
  std::vector<ConfigRule> config = {};
  std::vector<RequiredValue> required = {};
  std::vector<std::string> prefixes = {""};  ///< of the body's parameters, tried in this order
  std::vector<ModuleRule> modules = {};
  std::vector<PresenceRule> present = {};
  /// Tensors that are no parameters of the computation (buffers); "*" matches any text. Applied
  /// to the name after the prefix.
  std::vector<std::string> ignored = {};

  /// The rule of a module; null if the family has no such module.
  const ModuleRule* find(Module module) const;
};

/// The policies that come with moq.
std::span<const Policy> builtin_policies();

/// The policy whose `architectures` names one of config.json's.
/// @throws moq::Error that lists the known architectures
const Policy& find_policy(const checkpoint::Json& config, std::span<const Policy> policies);

/// A user's policy: the same table as JSON, field by field (docs/extend.md shows one).
/// @throws moq::Error naming the key, what was expected and what was found
Policy parse_policy(const checkpoint::Json& json, std::string_view where);

/// Name of a spec field, an enumerator or a module in JSON policies and messages, and back.
std::string_view name_of(Module module);
Module parse_module(std::string_view name, std::string_view where);
SpecField find_field(std::string_view name, std::string_view where);
std::string_view name_of(const SpecField& field);

/// Stores `value` in a field.
/// @throws moq::Error naming `where` if the value has another type, names no enumerator, or is an
///         integer beyond kMaxSize
void set_field(ModelSpec& spec, const SpecField& field, const checkpoint::Json& value,
               std::string_view where);

}  // namespace moq::inference
