#pragma once

#include <functional>
#include <map>
#include <string>

#include "inference/checkpoint/json.h"

namespace moq::inference {

/// What `quantization_config` of a config.json says about the arithmetic; how weights are stored is
/// read off the tensors themselves (weight_source.h).
class QuantizationConfig {
 public:
  /// @param config  config.json; without a quantization_config nothing reads INT8 activations
  /// @throws moq::Error naming the key, what was expected and what was found, for anything that the
  ///         engine does not compute: other methods, quantized outputs or caches, transforms, and
  ///         input activations other than symmetric INT8 with a scale per token
  static QuantizationConfig parse(const checkpoint::Json& config);

  /// Whether a quantized module was trained to read INT8 activations.
  /// @throws moq::Error if the groups differ in that and none names the module
  bool reads_int8(const std::string& module) const;

 private:
  void read_group(const std::string& name, const checkpoint::Json& group);

  std::map<std::string, bool, std::less<>> by_module_;  ///< what groups say of modules they name
  bool some_read_int8_ = false;
  bool some_read_floats_ = false;
};

}  // namespace moq::inference
