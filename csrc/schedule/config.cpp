#include "csrc/schedule/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>

#include "kernels/common/check.h"

namespace moq::schedule {

namespace {

struct StretchRule {
  const char* name;
  double (*factor)(double sensitivity);
};

constexpr double kLargestFactor = 5.0;

// A rule is one row. It must not fall with the sensitivity, start at 1 and end at kLargestFactor or
// below, since the bounds of a plan are taken at 0 and 1.
constexpr std::array kStretchRules = {
    StretchRule{"none", [](double) { return 1.0; }},
    StretchRule{"stepped", [](double s) { return 1.0 + std::floor(4.0 * s); }},
    StretchRule{"linear", [](double s) { return 1.0 + 4.0 * s; }},
};

const StretchRule& find_stretch_rule(const std::string& name) {
  const auto* rule = std::find_if(kStretchRules.begin(), kStretchRules.end(),
                                  [&](const StretchRule& row) { return name == row.name; });
  MOQ_CHECK(rule != kStretchRules.end(),
            "schedule: stretch_rule must be 'none', 'stepped' or 'linear', got '", name, "'");
  return *rule;
}

/// floor(fraction * steps) is meant for decimal fractions too: 0.29 * 100 is 28.999999999999996.
constexpr double kAlmost = 1e-6;

/// The smallest number of steps of which `fraction` is at least `share`, unless it exceeds
/// kMaxSteps.
std::optional<std::int64_t> steps_for_share(double fraction, std::int64_t share) {
  const double estimate = std::ceil((static_cast<double>(share) - kAlmost) / fraction);
  if (estimate > static_cast<double>(kMaxSteps)) {
    return std::nullopt;
  }
  // deadline rounds too: the answer is the estimate or one of its neighbours.
  auto steps = std::max<std::int64_t>(1, static_cast<std::int64_t>(estimate) - 1);
  while (deadline(fraction, steps) < share) {
    ++steps;
  }
  return steps;
}

/// The smallest fraction, to six decimals, of which `steps` steps have `share`.
std::string fraction_for_share(std::int64_t share, std::int64_t steps) {
  constexpr std::int64_t kMillion = 1000000;
  const std::int64_t millionths = (share * kMillion + steps - 1) / steps;
  std::string digits = std::to_string(static_cast<double>(millionths) / kMillion);
  digits.erase(digits.find_last_not_of('0') + 1);
  return digits.back() == '.' ? digits + '0' : digits;
}

void check_rule(const std::string& name, const Geometric& rule) {
  MOQ_CHECK(rule.target_bits >= 1, "schedule: target_bits of '", name, "' must be >= 1, got ",
            rule.target_bits);
  MOQ_CHECK(rule.start_bits >= rule.target_bits && rule.start_bits <= 32,
            "schedule: start_bits of '", name, "' must be in [target_bits, 32] = [",
            rule.target_bits, ", 32], got ", rule.start_bits);
  MOQ_CHECK(rule.period >= 1 && rule.period <= kMaxSteps, "schedule: period of '", name,
            "' must be in [1, 2^40] steps, got ", rule.period);
  MOQ_CHECK(rule.offset >= 0 && rule.offset <= kMaxSteps, "schedule: offset of '", name,
            "' must be in [0, 2^40] steps, got ", rule.offset);
  MOQ_CHECK(rule.growth >= 1.0 && rule.growth <= 16.0, "schedule: growth of '", name,
            "' must be in [1, 16], got ", rule.growth);
  MOQ_CHECK(rule.counts_per_step >= 0 && rule.counts_per_step <= kMaxCounts,
            "schedule: counts_per_step of '", name, "' must be in [0, 2^20], got ",
            rule.counts_per_step);
  MOQ_CHECK(rule.counts_per_step == 0 || !rule.finish_at, "schedule: counts_per_step of '", name,
            "' must be 0 with finish_at, got ", rule.counts_per_step);
  residence_times(rule);
}

void check_rule(const std::string& name, const Table& table) {
  MOQ_CHECK(!table.empty() && table.begin()->first == 0, "schedule: the table of '", name,
            "' must have an entry at step 0 (its start width), got ",
            table.empty() ? std::string("an empty table")
                          : "step " + std::to_string(table.begin()->first) + " first");
  int previous = 33;
  for (const auto& [step, bits] : table) {
    MOQ_CHECK(step <= kMaxSteps, "schedule: the steps of the table of '", name,
              "' must be <= 2^40, got ", step);
    MOQ_CHECK(bits >= 1 && bits < previous, "schedule: the table of '", name,
              "' must fall strictly from at most 32 bits to at least 1, got ", bits,
              " bits at step ", step, step == 0 ? "" : " after " + std::to_string(previous));
    previous = bits;
  }
}

/// finish_at is hard, so a block that cannot meet it is an error whatever on_unfinished says.
void check_finish_at(const std::string& name, const Geometric& rule, std::int64_t total_steps) {
  const double finish_at = rule.finish_at.value();
  MOQ_CHECK(finish_at > 0.0 && finish_at <= 1.0, "schedule: finish_at of '", name,
            "' must be in (0, 1], got ", finish_at);
  const std::int64_t last = deadline(finish_at, total_steps);
  const std::int64_t needed = rule.offset + 1;
  if (rule.start_bits == rule.target_bits || needed <= last) {
    return;
  }
  std::ostringstream text;
  text << "schedule: the offset of '" << name
       << "' must lie before step floor(finish_at * total_steps) = " << last << ", got "
       << rule.offset;
  std::string before = ". Smallest change: ";
  const auto offer = [&](const auto&... words) {
    text << before;
    (text << ... << words);
    before = ", or ";
  };
  if (last > 0) {
    offer("offset <= ", last - 1);
  }
  if (const auto steps = steps_for_share(finish_at, needed)) {
    offer("total_steps >= ", *steps);
  }
  if (needed <= total_steps) {
    offer("finish_at >= ", fraction_for_share(needed, total_steps));
  }
  detail::fail(text.str());
}

}  // namespace

OnUnfinished parse_on_unfinished(const std::string& name) {
  for (const OnUnfinished policy :
       {OnUnfinished::kError, OnUnfinished::kClamp, OnUnfinished::kAllow}) {
    if (name == name_of(policy)) {
      return policy;
    }
  }
  detail::fail("schedule: on_unfinished must be 'error', 'clamp' or 'allow', got '", name, "'");
}

const char* name_of(OnUnfinished policy) {
  switch (policy) {
    case OnUnfinished::kError:
      return "error";
    case OnUnfinished::kClamp:
      return "clamp";
    case OnUnfinished::kAllow:
      return "allow";
  }
  return "unknown";
}

std::vector<std::string> stretch_rules() {
  std::vector<std::string> names;
  names.reserve(kStretchRules.size());
  for (const StretchRule& rule : kStretchRules) {
    names.emplace_back(rule.name);
  }
  return names;
}

std::int64_t stretch(const std::string& rule, double sensitivity) {
  const double factor = find_stretch_rule(rule).factor(sensitivity);
  return static_cast<std::int64_t>(std::clamp(factor, 1.0, kLargestFactor) * kOne);
}

std::int64_t deadline(double finish_at, std::int64_t total_steps) {
  return static_cast<std::int64_t>(
      std::floor(finish_at * static_cast<double>(total_steps) + kAlmost));
}

std::vector<std::int64_t> residence_times(const Geometric& rule) {
  const auto growth = static_cast<std::int64_t>(std::nearbyint(rule.growth * kOne));
  std::vector<std::int64_t> times;
  std::int64_t sum = 0;
  std::int64_t time = rule.period << kFractionBits;
  for (int bits = rule.start_bits; bits > rule.target_bits; --bits) {
    MOQ_CHECK(time <= kMaxDuration - sum, "schedule: the residence times from ", rule.start_bits,
              " to ", rule.target_bits, " bits must sum to at most 2^44 steps, got period ",
              rule.period, " growing by ", rule.growth, " at each drop");
    times.push_back(rule.counts_per_step > 0 ? time - sum : time);
    sum += times.back();
    // Both factors are below 2^61 and 2^21: the product needs more than 64 bits.
    time = static_cast<std::int64_t>(static_cast<__int128>(time) * growth >> kFractionBits);
  }
  return times;
}

void check_config(const ScheduleConfig& config) {
  MOQ_CHECK(config.total_steps >= 1 && config.total_steps <= kMaxSteps,
            "schedule: total_steps must be in [1, 2^40], got ", config.total_steps);
  find_stretch_rule(config.stretch_rule);
  for (const ScheduledBlock& block : config.blocks) {
    std::visit([&](const auto& rule) { check_rule(block.name, rule); }, block.rule);
    const auto* rule = std::get_if<Geometric>(&block.rule);
    if (rule != nullptr && rule->finish_at) {
      check_finish_at(block.name, *rule, config.total_steps);
    }
  }
}

void check_measurement(const ScheduleConfig& config, const Measurement& measurement,
                       std::int64_t previous_step) {
  MOQ_CHECK(
      config.stretch_rule != "none",
      "set_sensitivities: stretch_rule must be 'stepped' or 'linear' for a schedule that follows "
      "measurements, got 'none'");
  MOQ_CHECK(measurement.step >= previous_step && measurement.step <= kMaxSteps,
            "set_sensitivities: step must be in [", previous_step,
            ", 2^40], the first of them being the previous measurement's, got ", measurement.step);
  MOQ_CHECK(measurement.sensitivities.size() == config.blocks.size(),
            "set_sensitivities: there must be one sensitivity per block, got ",
            measurement.sensitivities.size(), " for ", config.blocks.size(), " blocks");
  for (std::size_t i = 0; i < config.blocks.size(); ++i) {
    const double value = measurement.sensitivities[i];
    MOQ_CHECK(value >= 0.0 && value <= 1.0, "set_sensitivities: the sensitivity of '",
              config.blocks[i].name, "' must be in [0, 1], got ", value);
  }
}

}  // namespace moq::schedule
