// Names of the spec's fields, enumerators and modules: what a JSON policy may write.
#include <array>

#include "inference/policies/policy.h"
#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using checkpoint::Json;

template <typename T>
struct Named {
  std::string_view name;
  T value;
};

constexpr std::array kFields{
    Named<SpecField>{"vocab_size", &ModelSpec::vocab_size},
    Named<SpecField>{"hidden_size", &ModelSpec::hidden_size},
    Named<SpecField>{"num_layers", &ModelSpec::num_layers},
    Named<SpecField>{"num_heads", &ModelSpec::num_heads},
    Named<SpecField>{"num_kv_heads", &ModelSpec::num_kv_heads},
    Named<SpecField>{"head_dim", &ModelSpec::head_dim},
    Named<SpecField>{"intermediate_size", &ModelSpec::intermediate_size},
    Named<SpecField>{"max_positions", &ModelSpec::max_positions},
    Named<SpecField>{"sliding_window", &ModelSpec::sliding_window},
    Named<SpecField>{"norm", &ModelSpec::norm},
    Named<SpecField>{"norm_place", &ModelSpec::norm_place},
    Named<SpecField>{"norm_epsilon", &ModelSpec::norm_epsilon},
    Named<SpecField>{"norm_bias", &ModelSpec::norm_bias},
    Named<SpecField>{"embedding_norm", &ModelSpec::embedding_norm},
    Named<SpecField>{"parallel_residual", &ModelSpec::parallel_residual},
    Named<SpecField>{"attention", &ModelSpec::attention},
    Named<SpecField>{"qk_norm", &ModelSpec::qk_norm},
    Named<SpecField>{"qkv_bias", &ModelSpec::qkv_bias},
    Named<SpecField>{"out_bias", &ModelSpec::out_bias},
    Named<SpecField>{"positions", &ModelSpec::positions},
    Named<SpecField>{"position_offset", &ModelSpec::position_offset},
    Named<SpecField>{"num_token_types", &ModelSpec::num_token_types},
    Named<SpecField>{"rope_theta", &ModelSpec::rope_theta},
    Named<SpecField>{"rotary_fraction", &ModelSpec::rotary_fraction},
    Named<SpecField>{"rope_scaling", &ModelSpec::rope_scaling},
    Named<SpecField>{"rope_factor", &ModelSpec::rope_factor},
    Named<SpecField>{"rope_low_freq_factor", &ModelSpec::rope_low_freq_factor},
    Named<SpecField>{"rope_high_freq_factor", &ModelSpec::rope_high_freq_factor},
    Named<SpecField>{"rope_original_positions", &ModelSpec::rope_original_positions},
    Named<SpecField>{"activation", &ModelSpec::activation},
    Named<SpecField>{"gated", &ModelSpec::gated},
    Named<SpecField>{"ffn_bias", &ModelSpec::ffn_bias},
    Named<SpecField>{"has_head", &ModelSpec::has_head},
    Named<SpecField>{"tied_head", &ModelSpec::tied_head},
    Named<SpecField>{"head_bias", &ModelSpec::head_bias},
    Named<SpecField>{"head_transform", &ModelSpec::head_transform},
    Named<SpecField>{"has_pooler", &ModelSpec::has_pooler},
    Named<SpecField>{"pooler_activation", &ModelSpec::pooler_activation},
    Named<SpecField>{"has_classifier", &ModelSpec::has_classifier},
    Named<SpecField>{"num_labels", &ModelSpec::num_labels},
};

constexpr std::array kModules{
    Named<Module>{"token_embedding", Module::kTokenEmbedding},
    Named<Module>{"position_embedding", Module::kPositionEmbedding},
    Named<Module>{"token_type_embedding", Module::kTokenTypeEmbedding},
    Named<Module>{"embedding_norm", Module::kEmbeddingNorm},
    Named<Module>{"attention_norm", Module::kAttentionNorm},
    Named<Module>{"qkv", Module::kQkv},
    Named<Module>{"query", Module::kQuery},
    Named<Module>{"key", Module::kKey},
    Named<Module>{"value", Module::kValue},
    Named<Module>{"query_norm", Module::kQueryNorm},
    Named<Module>{"key_norm", Module::kKeyNorm},
    Named<Module>{"attention_out", Module::kAttentionOut},
    Named<Module>{"ffn_norm", Module::kFfnNorm},
    Named<Module>{"gate_up", Module::kGateUp},
    Named<Module>{"gate", Module::kGate},
    Named<Module>{"up", Module::kUp},
    Named<Module>{"down", Module::kDown},
    Named<Module>{"final_norm", Module::kFinalNorm},
    Named<Module>{"head_dense", Module::kHeadDense},
    Named<Module>{"head_norm", Module::kHeadNorm},
    Named<Module>{"head", Module::kHead},
    Named<Module>{"pooler", Module::kPooler},
    Named<Module>{"classifier", Module::kClassifier},
};

// Enumerators go by the names that config.json uses where it names them, and several may mean one.
constexpr std::array kNorms{
    Named<NormKind>{"layer_norm", NormKind::kLayerNorm},
    Named<NormKind>{"rms_norm", NormKind::kRmsNorm},
};
constexpr std::array kNormPlaces{
    Named<NormPlace>{"pre", NormPlace::kPre},
    Named<NormPlace>{"post", NormPlace::kPost},
};
constexpr std::array kAttentions{
    Named<AttentionKind>{"causal", AttentionKind::kCausal},
    Named<AttentionKind>{"bidirectional", AttentionKind::kBidirectional},
};
constexpr std::array kPositions{
    Named<PositionKind>{"none", PositionKind::kNone},
    Named<PositionKind>{"learned", PositionKind::kLearned},
    Named<PositionKind>{"rotary", PositionKind::kRotary},
    Named<PositionKind>{"alibi", PositionKind::kAlibi},
};
constexpr std::array kRotaryScalings{
    Named<kernels::RotaryScaling>{"default", kernels::RotaryScaling::kNone},
    Named<kernels::RotaryScaling>{"linear", kernels::RotaryScaling::kLinear},
    Named<kernels::RotaryScaling>{"llama3", kernels::RotaryScaling::kLlama3},
};
constexpr std::array kActivations{
    Named<kernels::Activation>{"gelu", kernels::Activation::kGelu},
    Named<kernels::Activation>{"gelu_python", kernels::Activation::kGelu},
    Named<kernels::Activation>{"gelu_new", kernels::Activation::kGeluTanh},
    Named<kernels::Activation>{"gelu_fast", kernels::Activation::kGeluTanh},
    Named<kernels::Activation>{"gelu_pytorch_tanh", kernels::Activation::kGeluTanh},
    Named<kernels::Activation>{"relu", kernels::Activation::kRelu},
    Named<kernels::Activation>{"silu", kernels::Activation::kSilu},
    Named<kernels::Activation>{"swish", kernels::Activation::kSilu},
    Named<kernels::Activation>{"tanh", kernels::Activation::kTanh},
};

template <typename Table>
const auto& look_up(const Table& table, std::string_view name, std::string_view where) {
  std::string known;
  for (const auto& entry : table) {
    if (entry.name == name) {
      return entry.value;
    }
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  detail::fail(where, ": must be one of ", known, ", got \"", name, "\"");
}

template <typename Table, typename Value>
std::string_view name_in(const Table& table, const Value& value) {
  for (const auto& entry : table) {
    if (entry.value == value) {
      return entry.name;
    }
  }
  return "unknown";
}

void assign(std::int64_t& field, const Json& value, std::string_view where) {
  const std::int64_t size = value.as_integer(where);
  MOQ_CHECK(size >= -kMaxSize && size <= kMaxSize, where, " must be at most ", kMaxSize, ", got ",
            size);
  field = size;
}
void assign(double& field, const Json& value, std::string_view where) {
  field = value.as_number(where);
}
void assign(bool& field, const Json& value, std::string_view where) {
  field = value.as_boolean(where);
}
void assign(NormKind& field, const Json& value, std::string_view where) {
  field = look_up(kNorms, value.as_string(where), where);
}
void assign(NormPlace& field, const Json& value, std::string_view where) {
  field = look_up(kNormPlaces, value.as_string(where), where);
}
void assign(AttentionKind& field, const Json& value, std::string_view where) {
  field = look_up(kAttentions, value.as_string(where), where);
}
void assign(PositionKind& field, const Json& value, std::string_view where) {
  field = look_up(kPositions, value.as_string(where), where);
}
void assign(kernels::RotaryScaling& field, const Json& value, std::string_view where) {
  field = look_up(kRotaryScalings, value.as_string(where), where);
}
void assign(kernels::Activation& field, const Json& value, std::string_view where) {
  field = look_up(kActivations, value.as_string(where), where);
}

}  // namespace

std::string_view name_of(Module module) {
  return name_in(kModules, module);
}

Module parse_module(std::string_view name, std::string_view where) {
  return look_up(kModules, name, where);
}

SpecField find_field(std::string_view name, std::string_view where) {
  return look_up(kFields, name, where);
}

std::string_view name_of(const SpecField& field) {
  return name_in(kFields, field);
}

void set_field(ModelSpec& spec, const SpecField& field, const Json& value, std::string_view where) {
  std::visit([&](auto member) { assign(spec.*member, value, where); }, field);
}

}  // namespace moq::inference
