#include "inference/engine/quantization_config.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/cpp/checkpoint/crafted_file.h"

namespace moq::inference {
namespace {

using checkpoint::error_of;
using checkpoint::Json;
using kernels::InputMode;

constexpr const char* kDynamic =
    R"({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true})";

constexpr const char* kStatic =
    R"({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "tensor", "dynamic": false})";

constexpr const char* kDynamicAsymmetric =
    R"({"num_bits": 8, "type": "int", "symmetric": false, "strategy": "token", "dynamic": true})";

constexpr const char* kStaticAsymmetric =
    R"({"num_bits": 8, "type": "int", "symmetric": false, "strategy": "tensor", "dynamic": false})";

QuantizationConfig parse(const std::string& members) {
  const std::string text =
      R"({"quantization_config": {"quant_method": "compressed-tensors", )" + members + "}}";
  return QuantizationConfig::parse(Json::parse(text, "config.json"));
}

std::string groups(const std::string& first, const std::string& second) {
  return R"("config_groups": {"group_0": {"targets": ["a", "b"], "input_activations": )" + first +
         R"(}, "group_1": {"targets": ["c"], "input_activations": )" + second + "}}";
}

TEST(QuantizationConfig, ReadsFloatsWithoutAny) {
  EXPECT_EQ(QuantizationConfig::parse(Json::parse("{}", "config.json")).input_of("a"),
            InputMode::kFloat32);
  const Json null = Json::parse(R"({"quantization_config": null})", "config.json");
  EXPECT_EQ(QuantizationConfig::parse(null).input_of("a"), InputMode::kFloat32);
}

TEST(QuantizationConfig, NeedsNoNamesWhereAllGroupsAgree) {
  EXPECT_EQ(parse(groups(kDynamic, kDynamic)).input_of("unnamed"), InputMode::kDynamicInt8);
  EXPECT_EQ(parse(groups(kStatic, kStatic)).input_of("unnamed"), InputMode::kStaticInt8);
  EXPECT_EQ(parse(groups("null", "null")).input_of("unnamed"), InputMode::kFloat32);
}

TEST(QuantizationConfig, AsksTheGroupThatNamesTheModuleWhereTheyDiffer) {
  const QuantizationConfig config = parse(groups(kDynamic, kStatic));
  EXPECT_EQ(config.input_of("a"), InputMode::kDynamicInt8);
  EXPECT_EQ(config.input_of("b"), InputMode::kDynamicInt8);
  EXPECT_EQ(config.input_of("c"), InputMode::kStaticInt8);
  EXPECT_NE(error_of([&] { config.input_of("d"); }).find("got none that names d"),
            std::string::npos);
}

TEST(QuantizationConfig, TellsGridsWithAZeroPoint) {
  const QuantizationConfig config = parse(groups(kDynamicAsymmetric, kStaticAsymmetric));
  EXPECT_EQ(config.input_of("a"), InputMode::kDynamicAsymmetricInt8);
  EXPECT_EQ(config.input_of("c"), InputMode::kStaticAsymmetricInt8);
}

TEST(QuantizationConfig, AcceptsEmptyMembersOfThingsThatItDoesNotCompute) {
  EXPECT_NO_THROW(parse(R"("transform_config": {}, "kv_cache_scheme": null)"));
}

struct Refusal {
  const char* name;
  std::string members;
  const char* message;
};

std::string with_input(const std::string& input) {
  return groups(input, kDynamic);
}

class RefusedConfig : public testing::TestWithParam<Refusal> {};

TEST_P(RefusedConfig, NamesTheKey) {
  const std::string message = error_of([] { parse(GetParam().members); });
  EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    Keys, RefusedConfig,
    testing::Values(
        Refusal{"transform", R"("transform_config": {"config_groups": {"u": {}}})",
                "quantization_config.transform_config must be null"},
        Refusal{"kv_cache", R"("kv_cache_scheme": {"num_bits": 8})",
                "quantization_config.kv_cache_scheme must be null"},
        Refusal{"output",
                R"("config_groups": {"g": {"targets": [], "output_activations": {"num_bits": 8}}})",
                "config_groups.g.output_activations must be null"},
        Refusal{"float_weights",
                R"("config_groups": {"g": {"targets": [], "weights": {"type": "float"}}})",
                "g.weights.type must be \"int\" for the engine to compute this model, got \"float"},
        Refusal{"bits", with_input(R"({"num_bits": 4, "strategy": "token", "dynamic": true})"),
                "group_0.input_activations.num_bits must be 8"},
        Refusal{"float_activations",
                with_input(R"({"type": "float", "strategy": "token", "dynamic": true})"),
                "group_0.input_activations.type must be \"int\""},
        Refusal{"symmetric",
                with_input(R"({"symmetric": 1, "strategy": "token", "dynamic": true})"),
                "group_0.input_activations.symmetric"},
        Refusal{"tensor", with_input(R"({"strategy": "tensor", "dynamic": true})"),
                "group_0.input_activations.dynamic must be false"},
        Refusal{"no_strategy", with_input(R"({"dynamic": true})"),
                "strategy must be \"token\" for the engine to compute this model, got none"},
        Refusal{"static", with_input(R"({"strategy": "token", "dynamic": false})"),
                "group_0.input_activations.dynamic must be true"},
        Refusal{"local", with_input(R"({"strategy": "token", "dynamic": "local"})"),
                "group_0.input_activations.dynamic must be true"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moq::inference
