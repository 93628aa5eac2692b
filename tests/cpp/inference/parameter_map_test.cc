#include "inference/policies/parameter_map.h"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "inference/engine/weights.h"
#include "kernels/common/check.h"
#include "tests/cpp/inference/crafted_checkpoint.h"

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::error_of;
using checkpoint::Json;

constexpr const char* kLlama =
    R"("architectures": ["LlamaForCausalLM"], "vocab_size": 5, "num_hidden_layers": 1,
       "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 6,
       "max_position_embeddings": 9)";

/// A Llama of one layer, small enough to write down.
void write_llama(CraftedCheckpoint& files) {
  files.set_floats("model.embed_tokens.weight", {5, 8});
  files.set_floats("lm_head.weight", {5, 8});
  files.set_floats("model.norm.weight", {8});
  const std::string layer = "model.layers.0.";
  for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
    files.set_floats(layer + norm + ".weight", {8});
  }
  for (const char* proj : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
    files.set_floats(layer + "self_attn." + proj + ".weight", {8, 8});
  }
  files.set_floats(layer + "mlp.gate_proj.weight", {6, 8});
  files.set_floats(layer + "mlp.up_proj.weight", {6, 8});
  files.set_floats(layer + "mlp.down_proj.weight", {8, 6});
}

ParameterMap resolve(const Checkpoint& files, const std::string& config) {
  const Json json = Json::parse("{" + config + "}", "config.json");
  return ParameterMap::resolve(find_policy(json, builtin_policies()), json, files);
}

TEST(ParameterMap, FindsEveryParameterOfASmallModel) {
  CraftedCheckpoint crafted;
  write_llama(crafted);
  const Checkpoint files = crafted.open();
  const ParameterMap map = resolve(files, std::string(kLlama) + R"(, "hidden_size": 8)");
  EXPECT_EQ(map.spec().head_dim, 2);
  EXPECT_EQ(map.at(Module::kDown).matrix->cols(), 6);
}

struct Crafted {
  const char* name;
  const char* members;  ///< of config.json, beside the small model's
  const char* message;
};

class CraftedConfig : public testing::TestWithParam<Crafted> {};

TEST_P(CraftedConfig, IsRefusedBeforeAnythingIsComputedFromIt) {
  CraftedCheckpoint crafted;
  write_llama(crafted);
  const Checkpoint files = crafted.open();
  const std::string message =
      error_of([&] { resolve(files, std::string(kLlama) + ", " + GetParam().members); });
  EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    Configs, CraftedConfig,
    testing::Values(
        // Four heads of 2^62 + 2 wrap to the 8 rows that the projections have.
        Crafted{"wrapping_heads", R"("hidden_size": 8, "head_dim": 4611686018427387906)",
                "head_dim must be at most 2147483648"},
        Crafted{"large_head", R"("hidden_size": 8, "head_dim": 2147483648)",
                "num_heads * head_dim must be <= 2147483648"},
        Crafted{"huge_hidden", R"("hidden_size": 4611686018427387904)",
                "hidden_size must be at most 2147483648"},
        Crafted{"negative_hidden", R"("hidden_size": -9223372036854775808)",
                "hidden_size must be at most 2147483648"},
        Crafted{"unbounded_rotation", R"("hidden_size": 8, "partial_rotary_factor": 1e300)",
                "rotary_fraction must lie in (0, 1]"},
        Crafted{"negative_rotation", R"("hidden_size": 8, "partial_rotary_factor": -1)",
                "rotary_fraction must lie in (0, 1]"},
        Crafted{"no_factor",
                R"("hidden_size": 8, "rope_scaling": {"rope_type": "linear", "factor": 0})",
                "rope_factor must be > 0"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(ParameterMap, RefusesTheSameMatrixForTwoModules) {
  CraftedCheckpoint crafted;
  write_llama(crafted);
  crafted.erase("model.layers.0.self_attn.k_proj.weight");
  const Checkpoint files = crafted.open();
  const Json json =
      Json::parse("{" + std::string(kLlama) + R"(, "hidden_size": 8})", "config.json");
  Policy policy = find_policy(json, builtin_policies());
  for (ModuleRule& rule : policy.modules) {
    if (rule.module == Module::kKey) {
      rule.name = "layers.{layer}.self_attn.q_proj";
    }
  }
  const std::string message = error_of([&] { ParameterMap::resolve(policy, json, files); });
  EXPECT_NE(message.find("must use every tensor once, got model.layers.0.self_attn.q_proj.weight"),
            std::string::npos)
      << message;
}

TEST(ParameterMap, NeedsARuleForAClassifier) {
  CraftedCheckpoint crafted;
  write_llama(crafted);
  const Checkpoint files = crafted.open();
  const Json json =
      Json::parse("{" + std::string(kLlama) + R"(, "hidden_size": 8})", "config.json");
  Policy policy = find_policy(json, builtin_policies());
  policy.traits.has_classifier = true;
  const std::string message = error_of([&] { ParameterMap::resolve(policy, json, files); });
  EXPECT_NE(message.find("must have a rule for classifier"), std::string::npos) << message;
}

TEST(Weights, OfACraftedCheckpointAreRefusedWhereTheirNumbersDoNotFit) {
  CraftedCheckpoint crafted;
  write_llama(crafted);
  const std::string name = "model.layers.0.self_attn.o_proj.weight";
  crafted.erase(name);
  crafted.set<std::int64_t>(name + "_shape", "I64", {2}, {8, 8});
  crafted.set<std::uint32_t>(name + "_packed", "I32", {8, 1}, {0, 1, 2, 3, 4, 5, 6, 7});
  crafted.set_floats(name + "_scale", {8, 2});
  const auto load = [&](const CraftedCheckpoint& from, int rank) {
    const auto files = std::make_shared<const Checkpoint>(from.open());
    const ParameterMap map = resolve(*files, std::string(kLlama) + R"(, "hidden_size": 8)");
    return load_weights(map, files, {.rank = rank, .size = 3});
  };
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_NO_THROW(load(crafted, rank));
  }
  std::vector<float> scales(8, 1.0F);
  scales[2] = std::numeric_limits<float>::infinity();
  crafted.set(name + "_scale", "F32", {8, 1}, scales);
  EXPECT_NE(error_of([&] { load(crafted, 0); }).find("scales must be finite"), std::string::npos);
}

struct Outlined {
  const char* name;
  WeightDtype dtype;
  bool stored_integers = false;  ///< of the down projection, in groups, and of a key among floats
  bool tied = false;
  std::optional<bool> quantize_head = std::nullopt;
};

class WeightOutline : public testing::TestWithParam<Outlined> {};

TEST_P(WeightOutline, HasTheShapesThatAreLoaded) {
  const auto& [name, dtype, stored_integers, tied, quantize_head] = GetParam();
  CraftedCheckpoint crafted;
  write_llama(crafted);
  if (tied) {
    crafted.erase("lm_head.weight");
  }
  if (stored_integers) {
    const std::string layer = "model.layers.0.";
    const std::string down = layer + "mlp.down_proj.weight";
    crafted.set(down, "I8", {8, 6}, std::vector<std::int8_t>(48, 3));
    crafted.set_floats(down + "_scale", {8, 2});
    const std::string key = layer + "self_attn.k_proj.weight";
    crafted.set(key, "I8", {8, 8}, std::vector<std::int8_t>(64, 3));
    crafted.set_floats(key + "_scale", {8, 1});
  }
  const auto files = std::make_shared<const Checkpoint>(crafted.open());
  const ParameterMap map = resolve(*files, std::string(kLlama) + R"(, "hidden_size": 8)" +
                                               (tied ? R"(, "tie_word_embeddings": true)"
                                                     : R"(, "tie_word_embeddings": false)"));
  const auto shapes_of = [](const Weights& weights) {
    std::vector<kernels::LinearShape> shapes;
    for_each_linear(weights, [&](const Linear& linear) { shapes.push_back(linear.shape()); });
    return shapes;
  };
  for (const auto& [rank, size] : {std::pair{0, 1}, {0, 3}, {2, 3}}) {  // of four heads
    const LoadOptions options{
        .dtype = dtype, .quantize_head = quantize_head, .rank = rank, .size = size};
    const Weights outline = outline_weights(map, *files, options);
    EXPECT_EQ(shapes_of(outline), shapes_of(load_weights(map, files, options)));
    EXPECT_EQ(outline.token_embedding.rows(), 5);
    EXPECT_EQ(outline.token_embedding.cols, 8);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Every, WeightOutline,
    testing::Values(Outlined{"stored", WeightDtype::kAsStored},
                    Outlined{"int8", WeightDtype::kInt8}, Outlined{"fp16", WeightDtype::kFloat16},
                    Outlined{"fp32", WeightDtype::kFloat32},
                    Outlined{"int8_tied", WeightDtype::kInt8, false, true},
                    Outlined{"int8_float_head", WeightDtype::kInt8, false, true, false},
                    Outlined{"integers_stored", WeightDtype::kAsStored, true},
                    Outlined{"integers_int8", WeightDtype::kInt8, true},
                    Outlined{"integers_int8_head", WeightDtype::kInt8, true, false, true},
                    Outlined{"integers_expanded", WeightDtype::kFloat16, true}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moq::inference
