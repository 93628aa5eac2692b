#include "inference/policies/parameter_map.h"

#include <algorithm>
#include <set>
#include <vector>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::Json;

/// The member that a dotted key leads to; null if absent or JSON null.
const Json* find_key(const Json& config, std::string_view key) {
  const Json* value = &config;
  while (value != nullptr && !key.empty()) {
    const std::size_t dot = std::min(key.find('.'), key.size());
    value = value->find(key.substr(0, dot));
    key.remove_prefix(std::min(dot + 1, key.size()));
  }
  return value == nullptr || value->is_null() ? nullptr : value;
}

/// True if `text` matches `pattern`, in which "*" stands for any text.
bool matches(std::string_view pattern, std::string_view text) {
  const std::size_t star = pattern.find('*');
  if (star == std::string_view::npos) {
    return pattern == text;
  }
  if (!text.starts_with(pattern.substr(0, star))) {
    return false;
  }
  pattern.remove_prefix(star + 1);
  for (std::size_t skip = star; skip <= text.size(); ++skip) {
    if (matches(pattern, text.substr(skip))) {
      return true;
    }
  }
  return false;
}

std::string in_layer(std::string name, std::int64_t layer) {
  static constexpr std::string_view kLayer = "{layer}";
  if (const std::size_t at = name.find(kLayer); at != std::string::npos) {
    name.replace(at, kLayer.size(), std::to_string(layer));
  }
  return name;
}

struct ParameterNames {
  const char* weight;
  const char* bias;
};

constexpr ParameterNames kNames{".weight", ".bias"};
constexpr ParameterNames kTensorFlowNames{".gamma",
                                          ".beta"};  // of norms, in checkpoints of its age

enum class Kind : std::uint8_t { kMatrix, kNorm };

/// What the spec asks of one module.
struct Expected {
  Module module;
  Kind kind;
  std::int64_t rows;  ///< size, for a norm
  std::int64_t cols;  ///< 1 for a norm
  bool bias;
};

Expected matrix(Module module, std::int64_t rows, std::int64_t cols, bool bias) {
  return {module, Kind::kMatrix, rows, cols, bias};
}

Expected norm(Module module, std::int64_t size, bool bias) {
  return {module, Kind::kNorm, size, 1, bias};
}

std::vector<Expected> expected_once(const ModelSpec& spec) {
  const std::int64_t hidden = spec.hidden_size;
  const bool norm_bias = spec.norm == NormKind::kLayerNorm && spec.norm_bias;
  std::vector<Expected> modules{matrix(Module::kTokenEmbedding, spec.vocab_size, hidden, false)};
  if (spec.positions == PositionKind::kLearned) {
    modules.push_back(matrix(Module::kPositionEmbedding, spec.max_positions + spec.position_offset,
                             hidden, false));
  }
  if (spec.num_token_types > 0) {
    modules.push_back(matrix(Module::kTokenTypeEmbedding, spec.num_token_types, hidden, false));
  }
  if (spec.embedding_norm) {
    modules.push_back(norm(Module::kEmbeddingNorm, hidden, norm_bias));
  }
  if (spec.norm_place == NormPlace::kPre) {
    modules.push_back(norm(Module::kFinalNorm, hidden, norm_bias));
  }
  if (spec.has_head) {
    modules.push_back(matrix(Module::kHead, spec.vocab_size, hidden, spec.head_bias));
    if (spec.head_transform) {
      modules.push_back(matrix(Module::kHeadDense, hidden, hidden, true));
      modules.push_back(norm(Module::kHeadNorm, hidden, norm_bias));
    }
  }
  if (spec.has_pooler) {
    modules.push_back(matrix(Module::kPooler, hidden, hidden, true));
  }
  if (spec.has_classifier) {
    modules.push_back(matrix(Module::kClassifier, spec.num_labels, hidden, true));
  }
  return modules;
}

std::vector<Expected> expected_per_layer(const ModelSpec& spec, bool fused_qkv,
                                         bool fused_gate_up) {
  const std::int64_t hidden = spec.hidden_size;
  const std::int64_t q_rows = spec.num_heads * spec.head_dim;
  const std::int64_t kv_rows = spec.num_kv_heads * spec.head_dim;
  const bool norm_bias = spec.norm == NormKind::kLayerNorm && spec.norm_bias;
  std::vector<Expected> modules{
      norm(Module::kAttentionNorm, hidden, norm_bias),
      matrix(Module::kAttentionOut, hidden, q_rows, spec.out_bias),
      norm(Module::kFfnNorm, hidden, norm_bias),
      matrix(Module::kDown, hidden, spec.intermediate_size, spec.ffn_bias),
  };
  if (fused_qkv) {
    modules.push_back(matrix(Module::kQkv, q_rows + 2 * kv_rows, hidden, spec.qkv_bias));
  } else {
    modules.push_back(matrix(Module::kQuery, q_rows, hidden, spec.qkv_bias));
    modules.push_back(matrix(Module::kKey, kv_rows, hidden, spec.qkv_bias));
    modules.push_back(matrix(Module::kValue, kv_rows, hidden, spec.qkv_bias));
  }
  if (spec.qk_norm) {
    modules.push_back(norm(Module::kQueryNorm, spec.head_dim, false));
    modules.push_back(norm(Module::kKeyNorm, spec.head_dim, false));
  }
  const std::int64_t inner = spec.intermediate_size;
  if (spec.gated && fused_gate_up) {
    modules.push_back(matrix(Module::kGateUp, 2 * inner, hidden, spec.ffn_bias));
  } else {
    modules.push_back(matrix(Module::kUp, inner, hidden, spec.ffn_bias));
    if (spec.gated) {
      modules.push_back(matrix(Module::kGate, inner, hidden, spec.ffn_bias));
    }
  }
  return modules;
}

}  // namespace

/// The steps of resolve(), with what they share.
class ParameterMap::Resolver {
 public:
  Resolver(const Policy& policy, const Json& config, const Checkpoint& checkpoint,
           ParameterMap& map)
      : policy_(policy),
        config_(config),
        checkpoint_(checkpoint),
        map_(map),
        where_("policy " + policy.name + ": ") {}

  void run() {
    map_.spec_ = policy_.traits;
    read_config();
    find_prefix();
    read_presence();
    complete_spec();
    map_.spec_.check();
    const bool fused_qkv = policy_.find(Module::kQkv) != nullptr;
    const bool fused_gate_up = policy_.find(Module::kGateUp) != nullptr;
    for (const Expected& expected : expected_once(map_.spec_)) {
      bind(expected, 0);
    }
    for (std::int64_t layer = 0; layer < map_.spec_.num_layers; ++layer) {
      for (const Expected& expected : expected_per_layer(map_.spec_, fused_qkv, fused_gate_up)) {
        bind(expected, layer);
      }
    }
    check_all_used();
  }

 private:
  void read_config() {
    for (const RequiredValue& required : policy_.required) {
      const Json* value = find_key(config_, required.key);
      MOQ_CHECK(value == nullptr || value->dump() == required.value.dump(),
                "config.json: ", required.key, " must be ", required.value.dump(),
                " for the engine to compute this model, got ", value->dump());
    }
    for (const ConfigRule& rule : policy_.config) {
      for (const std::string& key : rule.keys) {
        if (const Json* value = find_key(config_, key)) {
          set_field(map_.spec_, rule.field, *value, "config.json: " + key);
          break;
        }
      }
    }
  }

  /// The policy's rule for a module that the model has.
  const ModuleRule& rule_of(Module module) const {
    const ModuleRule* rule = policy_.find(module);
    MOQ_CHECK(rule != nullptr, where_, "must have a rule for ", name_of(module),
              ", which the model spec needs, got none");
    return *rule;
  }

  /// The prefix with which the checkpoint has a token embedding.
  void find_prefix() {
    const ModuleRule& rule = rule_of(Module::kTokenEmbedding);
    std::string tried;
    for (const std::string& prefix : policy_.prefixes) {
      if (holds(prefix + rule.name)) {
        prefix_ = prefix;
        return;
      }
      tried += (tried.empty() ? "" : ", ") + prefix + rule.name + ".weight";
    }
    detail::fail(checkpoint_.directory().string(), ": must hold one of ", tried, ", got none");
  }

  bool holds(const std::string& name) const {
    return checkpoint_.contains(name + ".weight") ||
           checkpoint_.contains(name + ".weight_packed") || checkpoint_.contains(name + ".bias");
  }

  std::string full_name(const ModuleRule& rule, std::int64_t layer) const {
    return in_layer((rule.in_body ? prefix_ : "") + rule.name, layer);
  }

  void read_presence() {
    for (const PresenceRule& presence : policy_.present) {
      const ModuleRule* rule = policy_.find(presence.module);
      map_.spec_.*presence.flag = rule != nullptr && holds(full_name(*rule, 0));
    }
  }

  /// Fields that follow from others where config.json does not give them.
  void complete_spec() {
    ModelSpec& spec = map_.spec_;
    spec.architecture = policy_.name;
    if (const Json* names = config_.find("architectures");
        names != nullptr && names->is_array() && !names->as_array("architectures").empty()) {
      spec.architecture = names->as_array("architectures").front().as_string("architectures");
    }
    if (spec.attention == AttentionKind::kCausal && spec.tied_head) {
      spec.has_head = true;
    }
    if (spec.num_kv_heads == 0) {
      spec.num_kv_heads = spec.num_heads;
    }
    if (spec.head_dim == 0 && spec.num_heads > 0) {
      MOQ_CHECK(spec.hidden_size % spec.num_heads == 0,
                "config.json: hidden_size must be a multiple of the number of heads, got ",
                spec.hidden_size, " and ", spec.num_heads);
      spec.head_dim = spec.hidden_size / spec.num_heads;
    }
    if (spec.intermediate_size == 0) {
      spec.intermediate_size = 4 * spec.hidden_size;
    }
    if (spec.positions == PositionKind::kLearned) {
      spec.max_positions -= spec.position_offset;
    }
    if (spec.sliding_window > 0) {
      spec.max_positions = std::min(spec.max_positions, spec.sliding_window);
    }
    if (spec.has_classifier) {
      const ModuleRule& rule = rule_of(Module::kClassifier);
      const auto weight = WeightSource::find(checkpoint_, full_name(rule, 0), rule.layout);
      spec.num_labels = weight.has_value() ? weight->rows() : 0;
    }
  }

  void bind(const Expected& expected, std::int64_t layer) {
    const bool tied = expected.module == Module::kHead && map_.spec_.tied_head;
    ModuleParameters parameters;
    if (!tied || expected.bias || policy_.find(expected.module) != nullptr) {
      const ModuleRule& rule = rule_of(expected.module);
      parameters.name = full_name(rule, layer);
      parameters.order = rule.order;
      const bool tensorflow = expected.kind == Kind::kNorm &&
                              checkpoint_.contains(parameters.name + kTensorFlowNames.weight);
      const ParameterNames& names = tensorflow ? kTensorFlowNames : kNames;
      if (expected.kind == Kind::kNorm) {
        parameters.vector = &vector(parameters.name + names.weight, expected.rows);
      } else {
        bind_matrix(expected, rule, tied, parameters);
      }
      if (expected.bias) {
        parameters.bias = &vector(parameters.name + names.bias, expected.rows);
      }
    }
    map_.modules_.emplace(std::pair{expected.module, layer}, std::move(parameters));
  }

  void bind_matrix(const Expected& expected, const ModuleRule& rule, bool tied,
                   ModuleParameters& parameters) {
    std::optional<WeightSource> source =
        WeightSource::find(checkpoint_, parameters.name, rule.layout);
    if (!source.has_value()) {
      MOQ_CHECK(tied, checkpoint_.directory().string(), ": must hold ", parameters.name,
                ".weight (", name_of(expected.module), "), got none");
      return;
    }
    for (const std::string& name : source->tensor_names()) {
      use(name);
    }
    if (tied && !source->quantized()) {
      return;  // a second copy of the embedding, which some writers store
    }
    MOQ_CHECK(source->rows() == expected.rows && source->cols() == expected.cols,
              checkpoint_.directory().string(), ": ", parameters.name, " (",
              name_of(expected.module), ") must be [", expected.rows, ", ", expected.cols,
              "] as [output features, input features], got [", source->rows(), ", ", source->cols(),
              "]");
    parameters.matrix = std::move(source);
  }

  const checkpoint::TensorInfo& vector(const std::string& name, std::int64_t size) {
    const checkpoint::TensorInfo* tensor = checkpoint_.find(name);
    MOQ_CHECK(tensor != nullptr, checkpoint_.directory().string(), ": must hold ", name,
              ", got none");
    MOQ_CHECK(
        tensor->shape == std::vector<std::int64_t>{size} && float_dtype(tensor->dtype).has_value(),
        checkpoint_.directory().string(), ": ", name, " must be F32, F16 or BF16 of shape [", size,
        "], got ", tensor->dtype, " with ", tensor->shape.size(), " dimensions and ",
        tensor->size_bytes(), " bytes");
    use(name);
    return *tensor;
  }

  void use(const std::string& name) {
    MOQ_CHECK(used_.insert(name).second, where_, "must use every tensor once, got ", name,
              " for two modules");
  }

  void check_all_used() const {
    for (const std::string& name : checkpoint_.names()) {
      if (used_.contains(name)) {
        continue;
      }
      std::string_view body = name;
      if (body.starts_with(prefix_)) {
        body.remove_prefix(prefix_.size());
      }
      const bool ignored =
          std::any_of(policy_.ignored.begin(), policy_.ignored.end(),
                      [&](const std::string& p) { return matches(p, body) || matches(p, name); });
      MOQ_CHECK(ignored, checkpoint_.directory().string(),
                ": every tensor must belong to a module "
                "of policy ",
                policy_.name, ", got ", name,
                ", which none of its rules names: pass a policy that does");
    }
  }

  const Policy& policy_;
  const Json& config_;
  const Checkpoint& checkpoint_;
  ParameterMap& map_;
  std::string where_;
  std::string prefix_;
  std::set<std::string, std::less<>> used_;
};

ParameterMap ParameterMap::resolve(const Policy& policy, const Json& config,
                                   const Checkpoint& checkpoint) {
  ParameterMap map;
  Resolver(policy, config, checkpoint, map).run();
  return map;
}

const ModuleParameters* ParameterMap::find(Module module, std::int64_t layer) const {
  const auto found = modules_.find({module, layer});
  return found == modules_.end() ? nullptr : &found->second;
}

const ModuleParameters& ParameterMap::at(Module module, std::int64_t layer) const {
  const ModuleParameters* found = find(module, layer);
  MOQ_CHECK(found != nullptr, "parameter map: the model must have ", name_of(module), ", got none");
  return *found;
}

}  // namespace moq::inference
