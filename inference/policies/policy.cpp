#include "inference/policies/policy.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

/// The place of a key in messages.
std::string below(const std::string& where, const char* separator, const std::string& key) {
  std::string place = where;
  place += separator;
  place += key;
  return place;
}

using checkpoint::Json;

std::vector<std::string> string_list(const Json& json, const std::string& where) {
  if (json.is_string()) {
    return {json.as_string(where)};
  }
  std::vector<std::string> list;
  for (const Json& item : json.as_array(where)) {
    list.push_back(item.as_string(where));
  }
  return list;
}

ModuleRule parse_rule(const std::string& key, const Json& json, const std::string& where) {
  ModuleRule rule{.module = parse_module(key, where), .name = {}};
  if (json.is_string()) {
    rule.name = json.as_string(where);
    return rule;
  }
  rule.name = json.at("name", where).as_string(where);
  for (const auto& [option, value] : json.as_object(where)) {
    const std::string at = below(where, ".", option);
    if (option == "layout") {
      const std::string& layout = value.as_string(at);
      MOQ_CHECK(layout == "out_in" || layout == "in_out", at,
                " must be out_in (Linear) or in_out (Conv1D), got \"", layout, "\"");
      rule.layout = layout == "out_in" ? WeightLayout::kOutIn : WeightLayout::kInOut;
    } else if (option == "order") {
      rule.order = parse_qkv_order(value.as_string(at), at);
    } else if (option == "in_body") {
      rule.in_body = value.as_boolean(at);
    } else {
      MOQ_CHECK(option == "name", at, ": must be one of name, layout, order, in_body");
    }
  }
  return rule;
}

}  // namespace

const ModuleRule* Policy::find(Module module) const {
  const auto rule = std::find_if(modules.begin(), modules.end(),
                                 [&](const ModuleRule& r) { return r.module == module; });
  return rule == modules.end() ? nullptr : &*rule;
}

const Policy& find_policy(const Json& config, std::span<const Policy> policies) {
  const Json* architectures = config.find("architectures");
  const Json* model_type = config.find("model_type");
  const bool named = architectures != nullptr && !architectures->is_null();
  std::string known;
  for (const Policy& policy : policies) {
    for (const std::string& name : policy.architectures) {
      known += (known.empty() ? "" : ", ") + name;
      if (named) {
        for (const Json& entry : architectures->as_array("config.json: architectures")) {
          if (entry.as_string("config.json: architectures") == name) {
            return policy;
          }
        }
      }
    }
    if (!named && model_type != nullptr && model_type->dump() == Json(policy.name).dump()) {
      return policy;
    }
  }
  detail::fail("config.json: architectures must name one of ", known, "; got ",
               named ? architectures->dump() : std::string("none"),
               ". Remedy: pass a policy for it (policy=, a JSON file)");
}

Policy parse_policy(const Json& json, std::string_view where_view) {
  const std::string where(where_view);
  Policy policy;
  policy.name = json.at("name", where).as_string(where + ": name");
  for (const auto& [key, value] : json.as_object(where)) {
    const std::string at = below(where, ": ", key);
    if (key == "architectures") {
      policy.architectures = string_list(value, at);
    } else if (key == "spec") {
      for (const auto& [field, constant] : value.as_object(at)) {
        set_field(policy.traits, find_field(field, at), constant, below(at, ".", field));
      }
    } else if (key == "config") {
      for (const auto& [field, keys] : value.as_object(at)) {
        policy.config.push_back({find_field(field, at), string_list(keys, below(at, ".", field))});
      }
    } else if (key == "required") {
      for (const auto& [name, constant] : value.as_object(at)) {
        policy.required.push_back({name, constant});
      }
    } else if (key == "prefixes") {
      policy.prefixes = string_list(value, at);
    } else if (key == "modules") {
      for (const auto& [name, rule] : value.as_object(at)) {
        policy.modules.push_back(parse_rule(name, rule, below(at, ".", name)));
      }
    } else if (key == "present") {
      for (const auto& [flag, module] : value.as_object(at)) {
        const SpecField field = find_field(flag, at);
        const auto* member = std::get_if<bool ModelSpec::*>(&field);
        MOQ_CHECK(member != nullptr, at, ".", flag, ": must be a yes-or-no field, got another");
        policy.present.push_back({*member, parse_module(module.as_string(at), at)});
      }
    } else if (key == "ignored") {
      policy.ignored = string_list(value, at);
    } else {
      MOQ_CHECK(key == "name", at,
                ": must be one of name, architectures, spec, config, required, "
                "prefixes, modules, present, ignored");
    }
  }
  return policy;
}

}  // namespace moq::inference
