#include "inference/policies/policy.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <string>

#include "kernels/common/check.h"
#include "tests/cpp/error_of.h"

namespace moq::inference {
namespace {

using checkpoint::Json;
using test::error_of;

Json config_of(const std::string& architecture) {
  return Json::parse(R"({"architectures": [")" + architecture + R"("]})", "config.json");
}

class Builtin : public testing::TestWithParam<std::string> {};

TEST_P(Builtin, IsFoundByItsArchitecture) {
  const Policy& policy = find_policy(config_of(GetParam()), builtin_policies());
  EXPECT_NE(policy.find(Module::kTokenEmbedding), nullptr);
  EXPECT_NE(policy.find(Module::kDown), nullptr);
}

INSTANTIATE_TEST_SUITE_P(Architectures, Builtin,
                         testing::Values("LlamaForCausalLM", "MistralForCausalLM",
                                         "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel",
                                         "BertModel", "BertForSequenceClassification",
                                         "RobertaForSequenceClassification", "DistilBertModel"));

TEST(Policies, NameEveryArchitectureOnce) {
  std::set<std::string> names;
  for (const Policy& policy : builtin_policies()) {
    for (const std::string& name : policy.architectures) {
      EXPECT_TRUE(names.insert(name).second) << name;
    }
  }
}

TEST(Policies, NameEveryModuleOnce) {
  for (const Policy& policy : builtin_policies()) {
    std::set<Module> modules;
    for (const ModuleRule& rule : policy.modules) {
      EXPECT_TRUE(modules.insert(rule.module).second) << policy.name << " " << rule.name;
    }
  }
}

TEST(Policies, AreFoundByModelTypeWhereNoArchitectureIsNamed) {
  const Json config = Json::parse(R"({"model_type": "gpt2"})", "config.json");
  EXPECT_EQ(find_policy(config, builtin_policies()).name, "gpt2");
}

TEST(Policies, ListTheKnownOnesForAnUnknownArchitecture) {
  const std::string error = error_of([] { find_policy(config_of("Unknown"), builtin_policies()); });
  EXPECT_NE(error.find("LlamaForCausalLM"), std::string::npos) << error;
}

TEST(Fields, KeepTheirTypes) {
  ModelSpec spec;
  set_field(spec, find_field("rope_theta", "test"), Json(5e5), "test");
  set_field(spec, find_field("activation", "test"), Json("gelu_new"), "test");
  set_field(spec, find_field("gated", "test"), Json(true), "test");
  EXPECT_EQ(spec.rope_theta, 5e5);
  EXPECT_EQ(spec.activation, kernels::Activation::kGeluTanh);
  EXPECT_TRUE(spec.gated);
  EXPECT_THROW(set_field(spec, find_field("gated", "test"), Json(1), "test"), Error);
}

TEST(Fields, HoldNoSizeBeyondTheLargest) {
  ModelSpec spec;
  const SpecField field = find_field("head_dim", "test");
  set_field(spec, field, Json(kMaxSize), "test");
  EXPECT_EQ(spec.head_dim, kMaxSize);
  EXPECT_THROW(set_field(spec, field, Json(kMaxSize + 1), "test"), Error);
  EXPECT_THROW(set_field(spec, field, Json(std::numeric_limits<std::int64_t>::min()), "test"),
               Error);
}

ModelSpec small_spec() {
  return {.vocab_size = 7,
          .hidden_size = 8,
          .num_layers = 1,
          .num_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 2,
          .intermediate_size = 5,
          .max_positions = 9};
}

TEST(ModelSpec, AcceptsSizesThatFitTogetherOnly) {
  ModelSpec spec = small_spec();
  EXPECT_NO_THROW(spec.check());
  spec.num_kv_heads = 3;
  EXPECT_THROW(spec.check(), Error);
}

struct Spoiling {
  const char* name;
  void (*spoil)(ModelSpec& spec);
};

class UnsuitableSpec : public testing::TestWithParam<Spoiling> {};

TEST_P(UnsuitableSpec, IsRefused) {
  ModelSpec spec = small_spec();
  spec.positions = PositionKind::kRotary;
  EXPECT_NO_THROW(spec.check());
  GetParam().spoil(spec);
  EXPECT_THROW(spec.check(), Error);
}

using kernels::RotaryScaling;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

INSTANTIATE_TEST_SUITE_P(
    Fields, UnsuitableSpec,
    testing::Values(
        Spoiling{"no_layers", [](ModelSpec& s) { s.num_layers = 0; }},
        Spoiling{"huge_vocabulary", [](ModelSpec& s) { s.vocab_size = kMaxSize + 1; }},
        // Four heads of it wrap to 36 features in 64 bits.
        Spoiling{"wrapping_head", [](ModelSpec& s) { s.head_dim = (std::int64_t{1} << 62) + 9; }},
        Spoiling{"huge_product", [](ModelSpec& s) { s.head_dim = kMaxSize / 2; }},
        Spoiling{"odd_rotation", [](ModelSpec& s) { s.head_dim = 3; }},
        Spoiling{"no_rotation", [](ModelSpec& s) { s.rotary_fraction = 0.0; }},
        Spoiling{"negative_rotation", [](ModelSpec& s) { s.rotary_fraction = -1.0; }},
        Spoiling{"huge_rotation", [](ModelSpec& s) { s.rotary_fraction = 1e300; }},
        Spoiling{"nan_rotation", [](ModelSpec& s) { s.rotary_fraction = kNan; }},
        Spoiling{"no_theta", [](ModelSpec& s) { s.rope_theta = 0.0; }},
        Spoiling{"huge_theta", [](ModelSpec& s) { s.rope_theta = 1e300; }},
        Spoiling{"nan_theta", [](ModelSpec& s) { s.rope_theta = kNan; }},
        Spoiling{"no_factor",
                 [](ModelSpec& s) {
                   s.rope_scaling = RotaryScaling::kLinear;
                   s.rope_factor = 0.0;
                 }},
        Spoiling{"huge_factor",
                 [](ModelSpec& s) {
                   s.rope_scaling = RotaryScaling::kLlama3;
                   s.rope_factor = 1e300;
                 }},
        Spoiling{"equal_frequencies",
                 [](ModelSpec& s) {
                   s.rope_scaling = RotaryScaling::kLlama3;
                   s.rope_low_freq_factor = s.rope_high_freq_factor;
                 }},
        Spoiling{"no_original_positions",
                 [](ModelSpec& s) {
                   s.rope_scaling = RotaryScaling::kLlama3;
                   s.rope_original_positions = 0;
                 }},
        Spoiling{"nan_epsilon", [](ModelSpec& s) { s.norm_epsilon = kNan; }},
        Spoiling{"classifier_without_pooler", [](ModelSpec& s) { s.has_classifier = true; }}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moq::inference
