// The architectures that moq knows, as tables.
#include <array>

#include "inference/policies/policy.h"

namespace moq::inference {
namespace {

Policy gpt2() {
  return {
      .name = "gpt2",
      .architectures = {"GPT2LMHeadModel", "GPT2Model"},
      .traits = {.norm = NormKind::kLayerNorm,
                 .norm_place = NormPlace::kPre,
                 .attention = AttentionKind::kCausal,
                 .positions = PositionKind::kLearned,
                 .activation = kernels::Activation::kGeluTanh,
                 .has_head = true,
                 .tied_head = true},
      .config = {{&ModelSpec::vocab_size, {"vocab_size"}},
                 {&ModelSpec::hidden_size, {"n_embd"}},
                 {&ModelSpec::num_layers, {"n_layer"}},
                 {&ModelSpec::num_heads, {"n_head"}},
                 {&ModelSpec::intermediate_size, {"n_inner"}},
                 {&ModelSpec::max_positions, {"n_positions"}},
                 {&ModelSpec::norm_epsilon, {"layer_norm_epsilon"}},
                 {&ModelSpec::activation, {"activation_function"}},
                 {&ModelSpec::tied_head, {"tie_word_embeddings"}}},
      .required = {{"scale_attn_weights", true},
                   {"scale_attn_by_inverse_layer_idx", false},
                   {"add_cross_attention", false}},
      .prefixes = {"transformer.", ""},
      .modules = {{Module::kTokenEmbedding, "wte"},
                  {Module::kPositionEmbedding, "wpe"},
                  {Module::kAttentionNorm, "h.{layer}.ln_1"},
                  {Module::kQkv, "h.{layer}.attn.c_attn", WeightLayout::kInOut},
                  {Module::kAttentionOut, "h.{layer}.attn.c_proj", WeightLayout::kInOut},
                  {Module::kFfnNorm, "h.{layer}.ln_2"},
                  {Module::kUp, "h.{layer}.mlp.c_fc", WeightLayout::kInOut},
                  {Module::kDown, "h.{layer}.mlp.c_proj", WeightLayout::kInOut},
                  {Module::kFinalNorm, "ln_f"},
                  {.module = Module::kHead, .name = "lm_head", .in_body = false}},
      .ignored = {"h.*.attn.bias", "h.*.attn.masked_bias"},
  };
}

/// Llama and the families that differ from it by a few fields.
Policy llama() {
  return {
      .name = "llama",
      .architectures = {"LlamaForCausalLM", "LlamaModel"},
      .traits = {.norm = NormKind::kRmsNorm,
                 .norm_place = NormPlace::kPre,
                 .norm_epsilon = 1e-6,
                 .norm_bias = false,
                 .attention = AttentionKind::kCausal,
                 .qkv_bias = false,
                 .out_bias = false,
                 .positions = PositionKind::kRotary,
                 .activation = kernels::Activation::kSilu,
                 .gated = true,
                 .ffn_bias = false},
      .config = {{&ModelSpec::vocab_size, {"vocab_size"}},
                 {&ModelSpec::hidden_size, {"hidden_size"}},
                 {&ModelSpec::num_layers, {"num_hidden_layers"}},
                 {&ModelSpec::num_heads, {"num_attention_heads"}},
                 {&ModelSpec::num_kv_heads, {"num_key_value_heads"}},
                 {&ModelSpec::head_dim, {"head_dim"}},
                 {&ModelSpec::intermediate_size, {"intermediate_size"}},
                 {&ModelSpec::max_positions, {"max_position_embeddings"}},
                 {&ModelSpec::norm_epsilon, {"rms_norm_eps"}},
                 {&ModelSpec::activation, {"hidden_act"}},
                 {&ModelSpec::tied_head, {"tie_word_embeddings"}},
                 {&ModelSpec::qkv_bias, {"attention_bias"}},
                 {&ModelSpec::out_bias, {"attention_bias"}},
                 {&ModelSpec::ffn_bias, {"mlp_bias"}},
                 {&ModelSpec::rope_theta, {"rope_parameters.rope_theta", "rope_theta"}},
                 {&ModelSpec::rotary_fraction,
                  {"rope_parameters.partial_rotary_factor", "partial_rotary_factor"}},
                 {&ModelSpec::rope_scaling,
                  {"rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type"}},
                 {&ModelSpec::rope_factor, {"rope_parameters.factor", "rope_scaling.factor"}},
                 {&ModelSpec::rope_low_freq_factor,
                  {"rope_parameters.low_freq_factor", "rope_scaling.low_freq_factor"}},
                 {&ModelSpec::rope_high_freq_factor,
                  {"rope_parameters.high_freq_factor", "rope_scaling.high_freq_factor"}},
                 {&ModelSpec::rope_original_positions,
                  {"rope_parameters.original_max_position_embeddings",
                   "rope_scaling.original_max_position_embeddings"}}},
      .prefixes = {"model.", ""},
      .modules = {{Module::kTokenEmbedding, "embed_tokens"},
                  {Module::kAttentionNorm, "layers.{layer}.input_layernorm"},
                  {Module::kQuery, "layers.{layer}.self_attn.q_proj"},
                  {Module::kKey, "layers.{layer}.self_attn.k_proj"},
                  {Module::kValue, "layers.{layer}.self_attn.v_proj"},
                  {Module::kAttentionOut, "layers.{layer}.self_attn.o_proj"},
                  {Module::kFfnNorm, "layers.{layer}.post_attention_layernorm"},
                  {Module::kGate, "layers.{layer}.mlp.gate_proj"},
                  {Module::kUp, "layers.{layer}.mlp.up_proj"},
                  {Module::kDown, "layers.{layer}.mlp.down_proj"},
                  {Module::kFinalNorm, "norm"},
                  {.module = Module::kHead, .name = "lm_head", .in_body = false}},
      .present = {{&ModelSpec::has_head, Module::kHead}},
      .ignored = {"*.rotary_emb.inv_freq"},
  };
}

Policy mistral() {
  Policy policy = llama();
  policy.name = "mistral";
  policy.architectures = {"MistralForCausalLM", "MistralModel"};
  policy.config.push_back({&ModelSpec::sliding_window, {"sliding_window"}});
  return policy;
}

Policy qwen2() {
  Policy policy = llama();
  policy.name = "qwen2";
  policy.architectures = {"Qwen2ForCausalLM", "Qwen2Model"};
  policy.traits.qkv_bias = true;
  policy.required = {{"use_sliding_window", false}};
  return policy;
}

Policy qwen3() {
  Policy policy = llama();
  policy.name = "qwen3";
  policy.architectures = {"Qwen3ForCausalLM", "Qwen3Model"};
  policy.traits.qk_norm = true;
  policy.required = {{"use_sliding_window", false}};
  policy.modules.push_back({Module::kQueryNorm, "layers.{layer}.self_attn.q_norm"});
  policy.modules.push_back({Module::kKeyNorm, "layers.{layer}.self_attn.k_norm"});
  return policy;
}

Policy bert() {
  return {
      .name = "bert",
      .architectures = {"BertModel", "BertForSequenceClassification", "BertForMaskedLM"},
      .traits = {.norm = NormKind::kLayerNorm,
                 .norm_place = NormPlace::kPost,
                 .norm_epsilon = 1e-12,
                 .embedding_norm = true,
                 .attention = AttentionKind::kBidirectional,
                 .positions = PositionKind::kLearned,
                 .num_token_types = 2,
                 .activation = kernels::Activation::kGelu,
                 .tied_head = true,
                 .head_bias = true,
                 .head_transform = true,
                 .pooler_activation = kernels::Activation::kTanh},
      .config = {{&ModelSpec::vocab_size, {"vocab_size"}},
                 {&ModelSpec::hidden_size, {"hidden_size"}},
                 {&ModelSpec::num_layers, {"num_hidden_layers"}},
                 {&ModelSpec::num_heads, {"num_attention_heads"}},
                 {&ModelSpec::intermediate_size, {"intermediate_size"}},
                 {&ModelSpec::max_positions, {"max_position_embeddings"}},
                 {&ModelSpec::num_token_types, {"type_vocab_size"}},
                 {&ModelSpec::norm_epsilon, {"layer_norm_eps"}},
                 {&ModelSpec::activation, {"hidden_act"}},
                 {&ModelSpec::tied_head, {"tie_word_embeddings"}}},
      .required = {{"position_embedding_type", "absolute"},
                   {"is_decoder", false},
                   {"add_cross_attention", false}},
      .prefixes = {"bert.", ""},
      .modules = {{Module::kTokenEmbedding, "embeddings.word_embeddings"},
                  {Module::kPositionEmbedding, "embeddings.position_embeddings"},
                  {Module::kTokenTypeEmbedding, "embeddings.token_type_embeddings"},
                  {Module::kEmbeddingNorm, "embeddings.LayerNorm"},
                  {Module::kQuery, "encoder.layer.{layer}.attention.self.query"},
                  {Module::kKey, "encoder.layer.{layer}.attention.self.key"},
                  {Module::kValue, "encoder.layer.{layer}.attention.self.value"},
                  {Module::kAttentionOut, "encoder.layer.{layer}.attention.output.dense"},
                  {Module::kAttentionNorm, "encoder.layer.{layer}.attention.output.LayerNorm"},
                  {Module::kUp, "encoder.layer.{layer}.intermediate.dense"},
                  {Module::kDown, "encoder.layer.{layer}.output.dense"},
                  {Module::kFfnNorm, "encoder.layer.{layer}.output.LayerNorm"},
                  {Module::kPooler, "pooler.dense"},
                  {.module = Module::kClassifier, .name = "classifier", .in_body = false},
                  {.module = Module::kHeadDense,
                   .name = "cls.predictions.transform.dense",
                   .in_body = false},
                  {.module = Module::kHeadNorm,
                   .name = "cls.predictions.transform.LayerNorm",
                   .in_body = false},
                  {.module = Module::kHead, .name = "cls.predictions", .in_body = false}},
      .present = {{&ModelSpec::has_pooler, Module::kPooler},
                  {&ModelSpec::has_classifier, Module::kClassifier},
                  {&ModelSpec::has_head, Module::kHead}},
      .ignored = {"embeddings.position_ids", "cls.predictions.decoder.*", "cls.seq_relationship.*"},
  };
}

/// Replaces the rules of the modules that `rules` names.
void replace(Policy& policy, std::vector<ModuleRule> rules) {
  for (ModuleRule& rule : rules) {
    for (ModuleRule& old : policy.modules) {
      if (old.module == rule.module) {
        old = std::move(rule);
        break;
      }
    }
  }
}

Policy roberta() {
  Policy policy = bert();
  policy.name = "roberta";
  policy.architectures = {"RobertaModel", "RobertaForMaskedLM"};
  // Rows 0 and 1 of the position table belong to padding.
  policy.traits.position_offset = 2;
  policy.required.push_back({"pad_token_id", 1});
  policy.prefixes = {"roberta.", ""};
  replace(policy, {{.module = Module::kHeadDense, .name = "lm_head.dense", .in_body = false},
                   {.module = Module::kHeadNorm, .name = "lm_head.layer_norm", .in_body = false},
                   {.module = Module::kHead, .name = "lm_head", .in_body = false}});
  policy.ignored = {"embeddings.position_ids", "lm_head.decoder.*"};
  return policy;
}

/// Its pooler is part of the classification head, and the base model's one is left out of it.
Policy roberta_classifier() {
  Policy policy = roberta();
  policy.name = "roberta_classifier";
  policy.architectures = {"RobertaForSequenceClassification"};
  replace(policy,
          {{.module = Module::kPooler, .name = "classifier.dense", .in_body = false},
           {.module = Module::kClassifier, .name = "classifier.out_proj", .in_body = false}});
  return policy;
}

Policy distilbert() {
  Policy policy = bert();
  policy.name = "distilbert";
  policy.architectures = {"DistilBertModel", "DistilBertForSequenceClassification",
                          "DistilBertForMaskedLM"};
  policy.traits.num_token_types = 0;
  policy.traits.pooler_activation = kernels::Activation::kRelu;
  policy.config = {{&ModelSpec::vocab_size, {"vocab_size"}},
                   {&ModelSpec::hidden_size, {"dim"}},
                   {&ModelSpec::num_layers, {"n_layers"}},
                   {&ModelSpec::num_heads, {"n_heads"}},
                   {&ModelSpec::intermediate_size, {"hidden_dim"}},
                   {&ModelSpec::max_positions, {"max_position_embeddings"}},
                   {&ModelSpec::activation, {"activation"}},
                   {&ModelSpec::tied_head, {"tie_word_embeddings"}}};
  policy.required = {};
  policy.prefixes = {"distilbert.", ""};
  replace(policy, {{Module::kQuery, "transformer.layer.{layer}.attention.q_lin"},
                   {Module::kKey, "transformer.layer.{layer}.attention.k_lin"},
                   {Module::kValue, "transformer.layer.{layer}.attention.v_lin"},
                   {Module::kAttentionOut, "transformer.layer.{layer}.attention.out_lin"},
                   {Module::kAttentionNorm, "transformer.layer.{layer}.sa_layer_norm"},
                   {Module::kUp, "transformer.layer.{layer}.ffn.lin1"},
                   {Module::kDown, "transformer.layer.{layer}.ffn.lin2"},
                   {Module::kFfnNorm, "transformer.layer.{layer}.output_layer_norm"},
                   {.module = Module::kPooler, .name = "pre_classifier", .in_body = false},
                   {.module = Module::kHeadDense, .name = "vocab_transform", .in_body = false},
                   {.module = Module::kHeadNorm, .name = "vocab_layer_norm", .in_body = false},
                   {.module = Module::kHead, .name = "vocab_projector", .in_body = false}});
  policy.ignored = {};
  return policy;
}

}  // namespace

std::span<const Policy> builtin_policies() {
  static const std::array policies{llama(),     mistral(), qwen2(),   qwen3(),
                                   gpt2(),      bert(),    roberta(), roberta_classifier(),
                                   distilbert()};
  return policies;
}

}  // namespace moq::inference
