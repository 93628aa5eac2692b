#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "inference/checkpoint/json.h"

namespace moq::inference {

/// How a layer reads its input.
enum class InputActivations : std::uint8_t {
  kFloats,
  kDynamicInt8,  ///< INT8, a scale per token
  kStaticInt8,   ///< INT8, the scale that <module>.input_scale holds
};

/// What `quantization_config` of a config.json says about the arithmetic; how weights are stored is
/// read off the tensors themselves (weight_source.h).
class QuantizationConfig {
 public:
  /// @param config  config.json; without a quantization_config everything reads floats
  /// @throws moq::Error naming the key, what was expected and what was found, for anything that the
  ///         engine does not compute: other methods, quantized outputs or caches, transforms, and
  ///         input activations other than symmetric INT8 with a scale per token or a static one
  static QuantizationConfig parse(const checkpoint::Json& config);

  /// How a quantized module was trained to read its input.
  /// @throws moq::Error if the groups differ in that and none names the module
  InputActivations input_of(const std::string& module) const;

 private:
  void read_group(const std::string& name, const checkpoint::Json& group);

  /// What groups say of modules that they name.
  std::map<std::string, InputActivations, std::less<>> by_module_;
  std::optional<InputActivations> first_;  ///< of the groups
  bool differ_ = false;
};

}  // namespace moq::inference
