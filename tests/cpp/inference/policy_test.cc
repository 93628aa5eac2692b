#include "inference/policies/policy.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using checkpoint::Json;

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
  try {
    find_policy(config_of("Unknown"), builtin_policies());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("LlamaForCausalLM"), std::string::npos);
  }
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

TEST(ModelSpec, AcceptsSizesThatFitTogetherOnly) {
  ModelSpec spec{.vocab_size = 7,
                 .hidden_size = 8,
                 .num_layers = 1,
                 .num_heads = 4,
                 .num_kv_heads = 2,
                 .head_dim = 2,
                 .intermediate_size = 5,
                 .max_positions = 9};
  EXPECT_NO_THROW(spec.check());
  spec.num_kv_heads = 3;
  EXPECT_THROW(spec.check(), Error);
}

TEST(ModelSpec, RefusesARotationOfAnOddNumberOfDimensions) {
  ModelSpec spec{.vocab_size = 7,
                 .hidden_size = 9,
                 .num_layers = 1,
                 .num_heads = 3,
                 .num_kv_heads = 3,
                 .head_dim = 3,
                 .intermediate_size = 5,
                 .max_positions = 9,
                 .positions = PositionKind::kRotary};
  EXPECT_THROW(spec.check(), Error);
}

}  // namespace
}  // namespace moq::inference
