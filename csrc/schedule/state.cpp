#include "csrc/schedule/state.h"

#include <utility>
#include <vector>

#include "inference/checkpoint/json.h"
#include "kernels/common/check.h"

namespace moq::schedule {

namespace {

using checkpoint::Json;

constexpr const char* kWhere = "schedule state";

Json describe(const ScheduledBlock& block) {
  if (const auto* table = std::get_if<Table>(&block.rule)) {
    Json::Array entries;
    for (const auto& [step, bits] : *table) {
      entries.emplace_back(Json::Array{step, bits});
    }
    return Json::Object{{"name", block.name}, {"table", std::move(entries)}};
  }
  const auto& rule = std::get<Geometric>(block.rule);
  Json::Object members{{"name", block.name},
                       {"start_bits", rule.start_bits},
                       {"target_bits", rule.target_bits},
                       {"period", rule.period},
                       {"offset", rule.offset},
                       {"growth", rule.growth},
                       {"finish_at", rule.finish_at ? Json(*rule.finish_at) : Json()}};
  if (rule.counts_per_step > 0) {
    members.emplace_back("counts_per_step", rule.counts_per_step);
  }
  return members;
}

Json describe(const Measurement& measurement) {
  return Json::Object{{"step", measurement.step},
                      {"sensitivities", Json::Array(measurement.sensitivities.begin(),
                                                    measurement.sensitivities.end())}};
}

template <typename Item>
Json::Array describe(const std::vector<Item>& items) {
  Json::Array array;
  for (const Item& item : items) {
    array.push_back(describe(item));
  }
  return array;
}

/// Reads the members of one object of a state; errors name the object and the key.
class Members {
 public:
  Members(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  bool has(const char* key) const { return object_.find(key) != nullptr; }
  const Json& operator[](const char* key) const { return object_.at(key, where_); }
  std::string where(const char* key) const { return where_ + ": " + key; }

  std::int64_t integer(const char* key) const { return (*this)[key].as_integer(where(key)); }
  double number(const char* key) const { return (*this)[key].as_number(where(key)); }
  const std::string& string(const char* key) const { return (*this)[key].as_string(where(key)); }
  const Json::Array& array(const char* key) const { return (*this)[key].as_array(where(key)); }

 private:
  const Json& object_;
  std::string where_;
};

int as_bits(const Json& value, const std::string& where) {
  const std::int64_t bits = value.as_integer(where);
  MOQ_CHECK(bits >= 1 && bits <= 32, where, ": expected a width in [1, 32] bits, got ", bits);
  return static_cast<int>(bits);
}

ScheduledBlock block_from(const Members& members) {
  ScheduledBlock block{.name = members.string("name"), .rule = Geometric{}};
  if (members.has("table")) {
    Table table;
    const std::string where = members.where("table");
    for (const Json& entry : members.array("table")) {
      const Json::Array& pair = entry.as_array(where);
      MOQ_CHECK(pair.size() == 2, where, ": expected pairs of step and bits, got ", pair.size(),
                " numbers");
      table.emplace(pair[0].as_integer(where), as_bits(pair[1], where));
    }
    block.rule = std::move(table);
  } else {
    Geometric rule{.start_bits = as_bits(members["start_bits"], members.where("start_bits")),
                   .target_bits = as_bits(members["target_bits"], members.where("target_bits")),
                   .period = members.integer("period"),
                   .offset = members.integer("offset"),
                   .growth = members.number("growth")};
    if (!members["finish_at"].is_null()) {
      rule.finish_at = members.number("finish_at");
    }
    if (members.has("counts_per_step")) {
      rule.counts_per_step = members.integer("counts_per_step");
    }
    block.rule = rule;
  }
  return block;
}

Measurement measurement_from(const Members& members) {
  Measurement measurement{.step = members.integer("step"), .sensitivities = {}};
  for (const Json& value : members.array("sensitivities")) {
    measurement.sensitivities.push_back(value.as_number(members.where("sensitivities")));
  }
  return measurement;
}

}  // namespace

std::string to_json(const Schedule& schedule) {
  const ScheduleConfig& config = schedule.config();
  return Json(Json::Object{{"version", kStateVersion},
                           {"blocks", describe(config.blocks)},
                           {"total_steps", config.total_steps},
                           {"on_unfinished", name_of(config.on_unfinished)},
                           {"stretch_rule", config.stretch_rule},
                           {"measurements", describe(schedule.measurements())}})
      .dump();
}

Schedule from_json(std::string_view state) {
  const Json document = Json::parse(state, kWhere);
  const Members members(document, kWhere);
  const std::int64_t version = members.integer("version");
  MOQ_CHECK(version == kStateVersion, kWhere, ": version must be ", kStateVersion, ", got ",
            version, ": continue with the version of moq that saved it");
  ScheduleConfig config{.blocks = {},
                        .total_steps = members.integer("total_steps"),
                        .on_unfinished = parse_on_unfinished(members.string("on_unfinished")),
                        .stretch_rule = members.string("stretch_rule")};
  const auto entry_name = [](const char* key, std::size_t index) {
    return std::string(kWhere) + ": " + key + "[" + std::to_string(index) + "]";
  };
  for (const Json& block : members.array("blocks")) {
    config.blocks.push_back(block_from({block, entry_name("blocks", config.blocks.size())}));
  }
  std::vector<Measurement> measurements;
  for (const Json& entry : members.array("measurements")) {
    measurements.push_back(
        measurement_from({entry, entry_name("measurements", measurements.size())}));
  }
  return Schedule(std::move(config), std::move(measurements));
}

}  // namespace moq::schedule
