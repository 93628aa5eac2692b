#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>

#include "inference/checkpoint/json.h"
#include "kernels/input_rounding.h"

namespace moq::inference {

/// What `quantization_config` of a config.json says about the arithmetic; how weights are stored is
/// read off the tensors themselves (weight_source.h).
class QuantizationConfig {
 public:
  /// @param config  config.json; without a quantization_config everything reads floats
  /// @throws moq::Error naming the key, what was expected and what was found, for anything that the
  ///         engine does not compute: other methods, quantized outputs or caches, transforms, and
  ///         input activations other than INT8 with a scale per token or a static one
  static QuantizationConfig parse(const checkpoint::Json& config);

  /// How a quantized module was trained to read its input. The grid of a static mode is what
  /// <module>.input_scale and <module>.input_zero_point hold.
  /// @throws moq::Error if the groups differ in that and none names the module
  kernels::InputMode input_of(const std::string& module) const;

 private:
  void read_group(const std::string& name, const checkpoint::Json& group);

  /// What groups say of modules that they name.
  std::map<std::string, kernels::InputMode, std::less<>> by_module_;
  std::optional<kernels::InputMode> first_;  ///< of the groups
  bool differ_ = false;
};

}  // namespace moq::inference
