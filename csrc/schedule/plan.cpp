// From a configuration and measurements to drops.
//
// Ahead of a block lies a length for each of its drops: its unstretched residence times up to
// there, added up. It covers them at a pace, which its sensitivity slows down and which with
// finish_at is scaled by the factor common to all blocks with that finish_at, which brings the
// slowest of them to the deadline:
//
//   drop_j = start + ceil(pace * length_j)
//   pace   = scale * stretch
//   scale  = min over these blocks of (deadline - start) / (stretch * its last length)
//
// Where the block follows a counter, lengths are counts, of which a step has counts_per_step, and
// the n-th drop of all is stretched n - 1 times.
//
// A measurement subtracts what has been covered since `start`, which then moves to its step. All of
// it is integer arithmetic, and what has been covered is the only number that is rounded and kept:
// up, so that a block is never later than its paces say, however often it is measured.
#include <algorithm>
#include <map>

#include "csrc/schedule/config.h"
#include "kernels/common/check.h"

namespace moq::schedule {

namespace {

__extension__ using Wide = __int128;

/// Rounds up.
Wide divide(Wide dividend, Wide divisor) {
  return (dividend + divisor - 1) / divisor;
}

/// As good as never: no training is as long.
constexpr Wide kNever = Wide{1} << 62;

/// `steps` steps for each `per_length` of a length. Lengths count in units of 2^-16 steps.
struct Pace {
  Wide steps;
  Wide per_length;

  std::int64_t steps_for(Wide length) const {
    return static_cast<std::int64_t>(std::min(divide(steps * length, per_length), kNever));
  }
  Wide length_in(std::int64_t duration) const { return divide(duration * per_length, steps); }
  Pace stretched(Wide stretch) const { return {steps * stretch, per_length}; }
  bool operator<(const Pace& other) const {
    return steps * other.per_length < other.steps * per_length;
  }
};

/// One step a step, once it has been multiplied by a stretch.
constexpr Pace kUnscaled{1, Wide{1} << (2 * kFractionBits)};

/// A stretch to a power, in units of 2^-16. Bounded, so that products with lengths fit: what comes
/// as late never comes.
Wide power(std::int64_t stretch, std::size_t exponent) {
  Wide result = kOne;
  for (std::size_t i = 0; i < exponent; ++i) {
    result = std::min<Wide>(result * stretch >> kFractionBits, Wide{1} << 62);
  }
  return result;
}

/// One step for each counts_per_step counts.
Pace count_pace(const Geometric& rule) {
  return {kUnscaled.steps, kUnscaled.per_length * rule.counts_per_step};
}

/// One block between two measurements.
struct Progress {
  BlockPlan made;             ///< drops that have been made, or that nothing can move
  std::int64_t start = 0;     ///< step from which it moves at `pace`
  std::vector<Wide> lengths;  ///< from `start` to each drop that is yet to be made, > 0
  Pace pace = kUnscaled;
  std::optional<double> finish_at;
  std::optional<Pace> counter;  ///< steps for counts; `pace` is only for blocks without one
  std::int64_t stretch = kOne;  ///< of each next count
  std::int64_t latest = static_cast<std::int64_t>(kNever);  ///< step by which each drop is made

  /// The pace towards a drop, by its number among those that are yet to be made.
  Pace towards(std::size_t ahead) const {
    return counter ? counter->stretched(power(stretch, made.size() - 1 + ahead)) : pace;
  }
};

Progress begin(const ScheduledBlock& block, const ScheduleConfig& config) {
  const bool clamp = config.on_unfinished == OnUnfinished::kClamp;
  Progress progress;
  if (const auto* table = std::get_if<Table>(&block.rule)) {
    for (const auto& [step, bits] : *table) {
      progress.made.push_back({clamp ? std::min(step, config.total_steps) : step, bits});
    }
    return progress;
  }
  const auto& rule = std::get<Geometric>(block.rule);
  progress.made = {{0, rule.start_bits}};
  progress.start = clamp ? std::min(rule.offset, config.total_steps - 1) : rule.offset;
  progress.finish_at = rule.finish_at;
  if (rule.counts_per_step > 0) {
    progress.counter = count_pace(rule);
    progress.latest = clamp ? config.total_steps : progress.latest;
  }
  Wide length = 0;
  for (const std::int64_t time : residence_times(rule)) {
    progress.lengths.push_back(length += time);
  }
  return progress;
}

std::vector<Progress> begin(const ScheduleConfig& config) {
  std::vector<Progress> blocks;
  for (const ScheduledBlock& block : config.blocks) {
    blocks.push_back(begin(block, config));
  }
  return blocks;
}

/// The scale of each finish_at whose blocks have a drop ahead.
std::map<double, Pace> common_scales(const ScheduleConfig& config,
                                     const std::vector<Progress>& blocks,
                                     const std::vector<std::int64_t>& stretches) {
  std::map<double, Pace> scales;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const Progress& block = blocks[i];
    if (block.finish_at && !block.lengths.empty()) {
      const Pace own{deadline(*block.finish_at, config.total_steps) - block.start,
                     block.lengths.back() * stretches[i]};
      const auto [common, first] = scales.emplace(*block.finish_at, own);
      common->second = std::min(common->second, own);
    }
  }
  return scales;
}

void set_paces(const ScheduleConfig& config, const std::vector<std::int64_t>& stretches,
               std::vector<Progress>& blocks) {
  const std::map<double, Pace> scales = common_scales(config, blocks, stretches);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    Progress& block = blocks[i];
    block.stretch = stretches[i];
    const auto scale = block.finish_at ? scales.find(*block.finish_at) : scales.end();
    block.pace = (scale == scales.end() ? kUnscaled : scale->second).stretched(stretches[i]);
    if (config.on_unfinished == OnUnfinished::kClamp && !block.lengths.empty()) {
      const Pace fitted{config.total_steps - block.start, block.lengths.back()};
      block.pace = std::min(block.pace, fitted);
    }
  }
}

BlockPlan drops_of(const Progress& block) {
  BlockPlan drops = block.made;
  for (std::size_t ahead = 0; ahead < block.lengths.size(); ++ahead) {
    const std::int64_t step = block.start + block.towards(ahead).steps_for(block.lengths[ahead]);
    drops.push_back({std::min(step, block.latest), drops.back().bits - 1});
  }
  return drops;
}

/// Moves `block` on to `step`.
void advance(Progress& block, std::int64_t step) {
  if (step <= block.start) {
    return;
  }
  const BlockPlan drops = drops_of(block);
  const auto passed = [&] { return drops[block.made.size()].step <= step; };
  while (block.made.size() < drops.size() && passed()) {
    block.made.push_back(drops[block.made.size()]);
    block.lengths.erase(block.lengths.begin());
  }
  for (std::size_t ahead = 0; ahead < block.lengths.size(); ++ahead) {
    const Wide covered = block.towards(ahead).length_in(step - block.start);
    // The drop has not been made, so it lies ahead.
    block.lengths[ahead] = std::max<Wide>(block.lengths[ahead] - covered, 1);
  }
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
  const std::vector<std::int64_t> times = residence_times(rule);
  Wide length = 0;
  for (const std::int64_t time : times) {
    length += time;
  }
  if (times.empty()) {
    return rule.offset;
  }
  const Pace pace = rule.counts_per_step > 0
                        ? count_pace(rule).stretched(power(stretch, times.size() - 1))
                        : kUnscaled.stretched(stretch);
  return rule.offset + pace.steps_for(length);
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
  set_paces(config, std::vector<std::int64_t>(blocks.size(), kOne), blocks);
  std::int64_t previous_step = 0;
  for (const Measurement& measurement : measurements) {
    check_measurement(config, measurement, previous_step);
    previous_step = measurement.step;
    for (Progress& block : blocks) {
      advance(block, measurement.step);
    }
    set_paces(config, stretches_of(config, measurement.sensitivities), blocks);
  }
  Plan plan;
  for (const Progress& block : blocks) {
    plan.push_back(drops_of(block));
  }
  return plan;
}

Bounds bounds(const ScheduleConfig& config) {
  check_config(config);
  std::vector<Progress> blocks = begin(config);
  const std::int64_t least = stretch(config.stretch_rule, 0.0);
  const std::int64_t most = stretch(config.stretch_rule, 1.0);
  // A block is fastest when it alone is insensitive, and slowest when it alone is sensitive.
  const auto drops_if_alone = [&](std::size_t i, std::int64_t own, std::int64_t others) {
    std::vector<std::int64_t> stretches(blocks.size(), others);
    stretches[i] = own;
    set_paces(config, stretches, blocks);
    return drops_of(blocks[i]);
  };
  Bounds bounds;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    bounds.earliest.push_back(drops_if_alone(i, least, most));
    bounds.latest.push_back(drops_if_alone(i, most, least));
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
  ScheduleConfig unclamped = config;
  unclamped.on_unfinished = OnUnfinished::kAllow;
  const Plan latest = bounds(unclamped).latest;
  for (std::size_t i = 0; i < latest.size(); ++i) {
    const auto* rule = std::get_if<Geometric>(&config.blocks[i].rule);
    const bool has_deadline = rule != nullptr && rule->finish_at;
    if (latest[i].back().step <= config.total_steps || latest[i].size() == 1 || has_deadline) {
      continue;
    }
    Unfinished block{.block = config.blocks[i].name,
                     .arrival = latest[i].back().step,
                     .bits = bits_at(latest[i], config.total_steps),
                     .has_table = rule == nullptr};
    if (rule != nullptr) {
      block.largest_period =
          largest_period(*rule, stretch(config.stretch_rule, 1.0), config.total_steps);
    }
    late.push_back(block);
  }
  return late;
}

}  // namespace moq::schedule
