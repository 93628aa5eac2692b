#include "csrc/schedule/schedule.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#include "csrc/schedule/config.h"
#include "kernels/common/check.h"

namespace moq::schedule {

namespace {

/// A plan for rules alone names two blocks alike for each rule, of which a user reads one.
template <typename Blocks, typename Name>
std::size_t count_names(const Blocks& blocks, Name name) {
  std::set<std::string> names;
  for (const auto& block : blocks) {
    names.insert(block.*name);
  }
  return names.size();
}

/// The sentence a user reads instead of finding out after the training.
std::string describe(const ScheduleConfig& config, const std::vector<Unfinished>& late) {
  const Unfinished& slowest = *std::max_element(
      late.begin(), late.end(),
      [](const Unfinished& a, const Unfinished& b) { return a.arrival < b.arrival; });
  int reached = 0;
  std::optional<std::int64_t> period = slowest.largest_period;
  for (const Unfinished& block : late) {
    reached = std::max(reached, block.bits);
    period = period && block.largest_period ? std::min(period, block.largest_period) : std::nullopt;
  }
  const std::size_t count = count_names(late, &Unfinished::block);
  std::ostringstream text;
  text << "schedule: every block must reach its target by total_steps = " << config.total_steps
       << ", got " << count << " of " << count_names(config.blocks, &ScheduledBlock::name)
       << " that might not; the slowest, '" << slowest.block << "', arrives at step "
       << slowest.arrival;
  if (config.stretch_rule != "none") {
    text << " if its sensitivity is 1";
  }
  text << ". Smallest change: ";
  if (period) {
    text << (count == 1 ? "its period <= " : "period <= ") << *period
         << (count == 1 ? ", or " : " for all of these, or ");
  }
  ScheduleConfig unstretched = config;
  unstretched.stretch_rule = "none";
  if (unfinished(unstretched).empty()) {
    text << "sensitivity: {rule: none} (nothing is measured), or ";
  }
  text << "total_steps >= " << slowest.arrival << ", or target_bits >= " << reached;
  const auto has_table = [](const Unfinished& block) { return block.has_table; };
  if (!std::all_of(late.begin(), late.end(), has_table)) {
    text << ", or finish_at (at most 1.0) instead of period, which scales the periods to fit";
  }
  if (std::any_of(late.begin(), late.end(), has_table)) {
    text << ", or no step of the table beyond " << config.total_steps;
  }
  text << "; on_unfinished='clamp' shortens only the late blocks, 'allow' accepts the width "
          "reached";
  return text.str();
}

}  // namespace

Schedule::Schedule(ScheduleConfig config, std::vector<Measurement> measurements)
    : config_(std::move(config)),
      measurements_(std::move(measurements)),
      plan_(schedule::plan(config_, measurements_)) {
  if (config_.on_unfinished == OnUnfinished::kError) {
    const std::vector<Unfinished> late = unfinished(config_);
    MOQ_CHECK(late.empty(), describe(config_, late));
  }
}

int Schedule::bits_at(std::int64_t block, std::int64_t step) const {
  MOQ_CHECK(block >= 0 && block < num_blocks(), "bits_at: block must be in [0, ", num_blocks(),
            "), got ", block);
  return schedule::bits_at(plan_[static_cast<std::size_t>(block)], step);
}

bool Schedule::finished(std::int64_t step) const {
  return std::all_of(plan_.begin(), plan_.end(),
                     [&](const BlockPlan& block) { return block.back().step <= step; });
}

void Schedule::set_sensitivities(std::int64_t step, std::vector<double> sensitivities) {
  std::vector<Measurement> measurements = measurements_;
  measurements.push_back({step, std::move(sensitivities)});
  plan_ = schedule::plan(config_, measurements);
  measurements_ = std::move(measurements);
}

void Schedule::set_completed_steps(std::int64_t steps) {
  MOQ_CHECK(steps >= 0, "completed_steps must be >= 0, got ", steps);
  completed_steps_ = steps;
}

}  // namespace moq::schedule
