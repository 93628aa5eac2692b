#include "inference/engine/quantization_config.h"

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using checkpoint::Json;
using kernels::InputMode;

constexpr const char* kWhere = "config.json: quantization_config";

/// The member, unless it is absent, null or an empty object: writers put those where there is none.
const Json* find_set(const Json& json, std::string_view key) {
  const Json* value = json.find(key);
  const bool empty =
      value == nullptr || value->is_null() || (value->is_object() && value->as_object(key).empty());
  return empty ? nullptr : value;
}

void check_unset(const Json& json, const std::string& where, std::string_view key) {
  const Json* value = find_set(json, key);
  MOQ_CHECK(value == nullptr, where, ".", key, " must be null: the engine computes nothing of it, ",
            "got ", value->dump());
}

/// An absent member has the format's default, if that is the value wanted.
void check_value(const Json& json, const std::string& where, std::string_view key,
                 const Json& wanted, bool is_default) {
  const Json* value = json.find(key);
  MOQ_CHECK(value == nullptr ? is_default : value->dump() == wanted.dump(), where, ".", key,
            " must be ", wanted.dump(), " for the engine to compute this model, got ",
            value == nullptr ? "none" : value->dump());
}

}  // namespace

QuantizationConfig QuantizationConfig::parse(const Json& config) {
  QuantizationConfig quantization;
  const Json* json = find_set(config, "quantization_config");
  if (json == nullptr) {
    return quantization;
  }
  const std::string& method = json->at("quant_method", kWhere).as_string(kWhere);
  MOQ_CHECK(method == "compressed-tensors" || method == "moq", kWhere,
            ".quant_method must be compressed-tensors or moq, got \"", method,
            "\": export the model with moq, or load the unquantized one with dtype=\"int8\"");
  check_unset(*json, kWhere, "transform_config");
  check_unset(*json, kWhere, "kv_cache_scheme");
  if (const Json* groups = find_set(*json, "config_groups")) {
    for (const auto& [name, group] : groups->as_object(std::string(kWhere) + ".config_groups")) {
      quantization.read_group(name, group);
    }
  }
  return quantization;
}

void QuantizationConfig::read_group(const std::string& name, const Json& group) {
  const std::string where = std::string(kWhere) + ".config_groups." + name;
  check_unset(group, where, "output_activations");
  if (const Json* weights = find_set(group, "weights")) {
    check_value(*weights, where + ".weights", "type", "int", true);
  }
  auto mode = InputMode::kFloat32;
  if (const Json* input = find_set(group, "input_activations")) {
    const std::string at = where + ".input_activations";
    check_value(*input, at, "num_bits", 8, true);
    check_value(*input, at, "type", "int", true);
    const Json* symmetric = input->find("symmetric");
    const bool is_symmetric = symmetric == nullptr || symmetric->as_boolean(at + ".symmetric");
    const Json* strategy = input->find("strategy");
    const bool is_static = strategy != nullptr && strategy->dump() == R"("tensor")";
    mode = is_static      ? is_symmetric ? InputMode::kStaticInt8 : InputMode::kStaticAsymmetricInt8
           : is_symmetric ? InputMode::kDynamicInt8
                          : InputMode::kDynamicAsymmetricInt8;
    if (is_static) {
      check_value(*input, at, "dynamic", false, true);
    } else {
      check_value(*input, at, "strategy", "token", false);
      check_value(*input, at, "dynamic", true, false);
    }
  }
  differ_ = differ_ || first_.value_or(mode) != mode;
  first_ = first_.value_or(mode);
  for (const Json& target : group.at("targets", where).as_array(where + ".targets")) {
    by_module_[target.as_string(where + ".targets")] = mode;
  }
}

kernels::InputMode QuantizationConfig::input_of(const std::string& module) const {
  if (!differ_) {
    return first_.value_or(InputMode::kFloat32);
  }
  const auto found = by_module_.find(module);
  MOQ_CHECK(found != by_module_.end(), kWhere,
            ".config_groups must name each quantized module among their targets where they differ ",
            "in input_activations, got none that names ", module);
  return found->second;
}

}  // namespace moq::inference
