// From a configuration and measurements to drops.
//
// A block is a list of residence times still ahead of it, unstretched. Drops are placed by adding
// them up, stretched by its sensitivity and, with finish_at, scaled by the factor common to all
// blocks that brings the slowest one to the deadline:
//
//   drop_j = start + ceil(scale * stretch * (residence_1 + … + residence_j))
//   scale  = min over blocks of (deadline - start) / (stretch * sum of its residence times)
//
// A measurement splits the residence time it falls into in proportion to the steps already spent,
// and places what is left again. All of it is exact integer arithmetic; rounding up keeps a drop
// from falling into a step that has passed.
#include <algorithm>

#include "csrc/schedule/config.h"
#include "kernels/common/check.h"

namespace moq::schedule {

namespace {

__extension__ using Wide = __int128;

/// One block between two measurements.
struct Progress {
  BlockPlan made;                       ///< drops that have been made, or that nothing can move
  std::int64_t start = 0;               ///< step from which the residence times count
  std::vector<std::int64_t> residence;  ///< what is left of each width, unstretched, 2^-16 steps

  Wide remaining() const {
    Wide sum = 0;
    for (const std::int64_t time : residence) {
      sum += time;
    }
    return sum;
  }
};

/// The duration of `length` 2^-32 steps, counted as `steps` whole steps per `per_length`, rounded
/// up.
struct Scale {
  Wide steps;
  Wide per_length;

  std::int64_t operator()(Wide length) const {
    return static_cast<std::int64_t>((steps * length + per_length - 1) / per_length);
  }
  bool operator<(const Scale& other) const {
    return steps * other.per_length < other.steps * per_length;
  }
};

constexpr Scale kUnscaled{1, Wide{1} << (2 * kFractionBits)};

Progress begin(const BlockConfig& block, const ScheduleConfig& config) {
  const bool clamp = config.on_unfinished == OnUnfinished::kClamp;
  if (const auto* table = std::get_if<Table>(&block.rule)) {
    Progress progress;
    for (const auto& [step, bits] : *table) {
      progress.made.push_back({clamp ? std::min(step, config.total_steps) : step, bits});
    }
    return progress;
  }
  const auto& rule = std::get<Geometric>(block.rule);
  return {.made = {{0, rule.start_bits}},
          .start = clamp ? std::min(rule.offset, config.total_steps - 1) : rule.offset,
          .residence = residence_times(rule)};
}

std::vector<Progress> begin(const ScheduleConfig& config) {
  std::vector<Progress> blocks;
  for (const BlockConfig& block : config.blocks) {
    blocks.push_back(begin(block, config));
  }
  return blocks;
}

Scale scale_of(const ScheduleConfig& config, const Progress& block, Wide length) {
  const Scale fitted{config.total_steps - block.start, length};
  const bool late = kUnscaled(length) > config.total_steps - block.start;
  return config.on_unfinished == OnUnfinished::kClamp && late ? fitted : kUnscaled;
}

Plan place(const ScheduleConfig& config, const std::vector<Progress>& blocks,
           const std::vector<std::int64_t>& stretches) {
  std::optional<Scale> common;
  if (config.finish_at) {
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if (!blocks[i].residence.empty()) {
        const Scale own{deadline(config) - blocks[i].start, blocks[i].remaining() * stretches[i]};
        common = common ? std::min(*common, own) : own;
      }
    }
  }
  Plan plan;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const Progress& block = blocks[i];
    plan.push_back(block.made);
    if (block.residence.empty()) {
      continue;
    }
    const Scale scale =
        common ? *common : scale_of(config, block, block.remaining() * stretches[i]);
    Wide length = 0;
    for (const std::int64_t time : block.residence) {
      length += static_cast<Wide>(time) * stretches[i];
      plan.back().push_back({block.start + scale(length), plan.back().back().bits - 1});
    }
  }
  return plan;
}

/// Moves `block` on to `step` along its plan.
void advance(Progress& block, const BlockPlan& plan, std::int64_t step) {
  std::size_t passed = 0;
  while (passed < block.residence.size() && plan[block.made.size()].step <= step) {
    block.start = plan[block.made.size()].step;
    block.made.push_back(plan[block.made.size()]);
    ++passed;
  }
  block.residence.erase(block.residence.begin(),
                        block.residence.begin() + static_cast<std::ptrdiff_t>(passed));
  if (block.residence.empty() || step <= block.start) {
    return;
  }
  const std::int64_t leave = plan[block.made.size()].step;
  block.residence.front() = std::max<std::int64_t>(
      1, static_cast<std::int64_t>(static_cast<Wide>(block.residence.front()) * (leave - step) /
                                   (leave - block.start)));
  block.start = step;
}

std::vector<std::int64_t> stretches_of(const ScheduleConfig& config,
                                       std::span<const double> sensitivities) {
  std::vector<std::int64_t> stretches;
  for (const double sensitivity : sensitivities) {
    stretches.push_back(stretch(config.stretch_rule, sensitivity));
  }
  return stretches;
}

/// The unclamped step at which a block with `rule` arrives when nothing but its stretch delays it.
std::int64_t natural_arrival(const Geometric& rule, std::int64_t stretch) {
  Wide length = 0;
  for (const std::int64_t time : residence_times(rule)) {
    length += static_cast<Wide>(time) * stretch;
  }
  return rule.offset + kUnscaled(length);
}

/// The largest period with which `rule` arrives by `total_steps`, if there is one.
std::optional<std::int64_t> largest_period(Geometric rule, std::int64_t stretch,
                                           std::int64_t total_steps) {
  std::int64_t fits = 0;
  std::int64_t late = rule.period;
  while (late - fits > 1) {
    rule.period = fits + (late - fits) / 2;
    (natural_arrival(rule, stretch) <= total_steps ? fits : late) = rule.period;
  }
  return fits >= 1 ? std::optional(fits) : std::nullopt;
}

}  // namespace

Plan plan(const ScheduleConfig& config, std::span<const Measurement> measurements) {
  check_config(config);
  std::vector<Progress> blocks = begin(config);
  Plan drops = place(config, blocks, std::vector<std::int64_t>(blocks.size(), kOne));
  std::int64_t previous_step = 0;
  for (const Measurement& measurement : measurements) {
    check_measurement(config, measurement, previous_step);
    previous_step = measurement.step;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      advance(blocks[i], drops[i], measurement.step);
    }
    drops = place(config, blocks, stretches_of(config, measurement.sensitivities));
  }
  return drops;
}

Bounds bounds(const ScheduleConfig& config) {
  check_config(config);
  const std::vector<Progress> blocks = begin(config);
  const std::int64_t least = stretch(config.stretch_rule, 0.0);
  const std::int64_t most = stretch(config.stretch_rule, 1.0);
  Bounds bounds;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    // A block is fastest when it alone is insensitive, and slowest when it alone is sensitive.
    std::vector<std::int64_t> stretches(blocks.size(), most);
    stretches[i] = least;
    bounds.earliest.push_back(place(config, blocks, stretches)[i]);
    stretches.assign(blocks.size(), least);
    stretches[i] = most;
    bounds.latest.push_back(place(config, blocks, stretches)[i]);
  }
  return bounds;
}

int bits_at(const BlockPlan& plan, std::int64_t step) {
  MOQ_CHECK(!plan.empty() && step >= plan.front().step, "bits_at: step must be >= 0, got ", step);
  const auto next =
      std::upper_bound(plan.begin(), plan.end(), step,
                       [](std::int64_t s, const Drop& drop) { return s < drop.step; });
  return std::prev(next)->bits;
}

std::vector<Unfinished> unfinished(const ScheduleConfig& config) {
  check_config(config);
  std::vector<Unfinished> late;
  if (config.finish_at) {
    return late;
  }
  ScheduleConfig unclamped = config;
  unclamped.on_unfinished = OnUnfinished::kAllow;
  const Plan latest = bounds(unclamped).latest;
  for (std::size_t i = 0; i < latest.size(); ++i) {
    if (latest[i].back().step <= config.total_steps || latest[i].size() == 1) {
      continue;
    }
    Unfinished block{.block = config.blocks[i].name,
                     .arrival = latest[i].back().step,
                     .bits = bits_at(latest[i], config.total_steps)};
    if (const auto* rule = std::get_if<Geometric>(&config.blocks[i].rule)) {
      block.largest_period =
          largest_period(*rule, stretch(config.stretch_rule, 1.0), config.total_steps);
    }
    late.push_back(block);
  }
  return late;
}

}  // namespace moq::schedule
