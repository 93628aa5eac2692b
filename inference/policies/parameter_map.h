#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "inference/checkpoint/checkpoint.h"
#include "inference/engine/model_spec.h"
#include "inference/engine/weight_source.h"
#include "inference/policies/policy.h"

namespace moq::inference {

/// One module's parameters, found in a checkpoint.
struct ModuleParameters {
  std::string name;                                ///< full, without ".weight"
  QkvOrder order = QkvOrder::kConcatenated;        ///< of a fused kQkv
  std::optional<WeightSource> matrix;              ///< of projections and tables
  const checkpoint::TensorInfo* vector = nullptr;  ///< weight of a norm
  const checkpoint::TensorInfo* bias = nullptr;
};

/// Every parameter that a spec asks for, found in a checkpoint by a policy and checked against it:
/// each tensor of the checkpoint is used exactly once, and each has the shape that the spec
/// implies.
class ParameterMap {
 public:
  /// @param config  config.json
  /// @throws moq::Error naming the key, what was expected and what was found
  static ParameterMap resolve(const Policy& policy, const checkpoint::Json& config,
                              const checkpoint::Checkpoint& checkpoint);

  const ModelSpec& spec() const { return spec_; }

  /// Parameters of a module; null if the model has none, or has them fused into another module.
  const ModuleParameters* find(Module module, std::int64_t layer = 0) const;
  /// Parameters of a module that the spec implies.
  const ModuleParameters& at(Module module, std::int64_t layer = 0) const;
  /// All of them, by module and layer.
  const std::map<std::pair<Module, std::int64_t>, ModuleParameters>& modules() const {
    return modules_;
  }

 private:
  class Resolver;

  ModelSpec spec_;
  std::map<std::pair<Module, std::int64_t>, ModuleParameters> modules_;
};

}  // namespace moq::inference
