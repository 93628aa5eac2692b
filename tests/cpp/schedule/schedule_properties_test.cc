// Rules that hold for every configuration, checked on random ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "csrc/schedule/schedule.h"
#include "csrc/schedule/state.h"
#include "kernels/common/check.h"

namespace moq::schedule {
namespace {

class RandomSchedule : public ::testing::TestWithParam<int> {
 protected:
  std::int64_t draw(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
  }

  /// Blocks that fall by period or counter; with finish_at all of them by one share of the
  /// training.
  ScheduleConfig draw_config(bool with_finish_at) {
    ScheduleConfig config{.total_steps = draw(64, 5000),
                          .on_unfinished = OnUnfinished::kAllow,
                          .stretch_rule = draw(0, 1) == 0 ? "stepped" : "linear"};
    std::optional<double> finish_at;
    if (with_finish_at) {
      finish_at = static_cast<double>(draw(50, 100)) / 100.0;
    }
    for (std::int64_t i = draw(1, 8); i > 0; --i) {
      const int target = static_cast<int>(draw(1, 12));
      config.blocks.push_back(
          {std::to_string(i),
           Geometric{.start_bits = target + static_cast<int>(draw(0, 8)),
                     .target_bits = target,
                     .period = draw(1, 40),
                     .offset = draw(0, 31),
                     .growth = 1.0 + static_cast<double>(draw(0, 20)) / 10.0,
                     .finish_at = finish_at,
                     .counts_per_step = with_finish_at ? 0 : draw(0, 1) * draw(1, 90)}});
    }
    return config;
  }

  Table draw_table(std::int64_t total_steps) {
    Table table;
    int bits = static_cast<int>(draw(8, 16));
    for (std::int64_t step = 0; bits >= 1 && step <= 2 * total_steps;) {
      table[step] = bits;
      step += draw(1, total_steps);
      bits -= static_cast<int>(draw(1, 6));
    }
    return table;
  }

  /// Every kind of block in one schedule: by period, by two shares of the training, by table.
  ScheduleConfig draw_mixed_config() {
    ScheduleConfig config = draw_config(false);
    for (ScheduledBlock& block : config.blocks) {
      const std::int64_t kind = draw(0, 3);
      if (kind == 0) {
        block.rule = draw_table(config.total_steps);
      } else if (kind <= 2) {
        auto& rule = std::get<Geometric>(block.rule);
        rule.finish_at = kind == 1 ? 0.5 : 0.9;
        rule.counts_per_step = 0;
      }
    }
    return config;
  }

  /// Both ends of the range as often as what lies between: there the stretch rules are extreme.
  std::vector<double> draw_sensitivities(std::size_t count) {
    std::vector<double> values(count);
    for (double& value : values) {
      const std::int64_t kind = draw(0, 2);
      value = kind < 2 ? static_cast<double>(kind)
                       : std::uniform_real_distribution<double>(0.0, 1.0)(generator_);
    }
    return values;
  }

  /// Half of them at drops of the plan that holds by then, the others anywhere.
  std::vector<Measurement> draw_measurements(const ScheduleConfig& config) {
    std::vector<Measurement> measurements;
    for (std::int64_t i = draw(0, 8); i > 0; --i) {
      const Plan drops = plan(config, measurements);
      const BlockPlan& block = drops[static_cast<std::size_t>(draw(0, std::ssize(drops) - 1))];
      const std::int64_t drop =
          block[static_cast<std::size_t>(draw(0, std::ssize(block) - 1))].step;
      const std::int64_t step = draw(0, 1) == 0 ? drop : draw(0, config.total_steps);
      if (step <= config.total_steps &&
          (measurements.empty() || step >= measurements.back().step)) {
        measurements.push_back({step, draw_sensitivities(config.blocks.size())});
      }
    }
    return measurements;
  }

  std::mt19937_64 generator_{static_cast<std::uint64_t>(GetParam())};
};

TEST_P(RandomSchedule, StepsNeverFallAndBitsFallByOne) {
  const ScheduleConfig config = draw_config(GetParam() % 2 == 0);
  for (const BlockPlan& block : plan(config, draw_measurements(config))) {
    EXPECT_EQ(block.front().step, 0);
    for (std::size_t i = 1; i < block.size(); ++i) {
      EXPECT_EQ(block[i].bits, block[i - 1].bits - 1);
      EXPECT_GE(block[i].step, std::max<std::int64_t>(1, block[i - 1].step));
    }
  }
}

TEST_P(RandomSchedule, TheSlowestBlockArrivesExactlyAtFinishAt) {
  const ScheduleConfig config = draw_config(true);
  std::int64_t last = 0;
  bool any = false;
  for (const BlockPlan& block : plan(config, draw_measurements(config))) {
    any = any || block.size() > 1;
    last = std::max(last, block.back().step);
  }
  if (any) {
    const double finish_at = *std::get<Geometric>(config.blocks[0].rule).finish_at;
    EXPECT_EQ(last, static_cast<std::int64_t>(finish_at * config.total_steps + 1e-6));
  }
}

TEST_P(RandomSchedule, OfAnyMixtureIsMonotoneAndArrivesWhenItSays) {
  const ScheduleConfig config = draw_mixed_config();
  const Plan drops = plan(config, draw_measurements(config));
  std::map<double, std::int64_t> last;
  for (std::size_t i = 0; i < drops.size(); ++i) {
    const BlockPlan& block = drops[i];
    EXPECT_EQ(block.front().step, 0);
    for (std::size_t d = 1; d < block.size(); ++d) {
      EXPECT_LT(block[d].bits, block[d - 1].bits);
      EXPECT_GE(block[d].step, block[d - 1].step);
    }
    const auto* rule = std::get_if<Geometric>(&config.blocks[i].rule);
    if (rule == nullptr) {
      const Table& table = std::get<Table>(config.blocks[i].rule);
      ASSERT_EQ(block.size(), table.size());
      for (const Drop& drop : block) {
        EXPECT_EQ(table.at(drop.step), drop.bits);
      }
    } else if (rule->finish_at && block.size() > 1) {
      last[*rule->finish_at] = std::max(last[*rule->finish_at], block.back().step);
    }
  }
  for (const auto& [finish_at, step] : last) {
    EXPECT_EQ(step, static_cast<std::int64_t>(finish_at * config.total_steps + 1e-6));
  }
}

TEST_P(RandomSchedule, OfAMixtureIsRefusedOrFinishes) {
  ScheduleConfig config = draw_mixed_config();
  const std::vector<Measurement> measurements = draw_measurements(config);
  config.on_unfinished = OnUnfinished::kError;
  if (unfinished(config).empty()) {
    EXPECT_TRUE(Schedule(config, measurements).finished(config.total_steps));
  } else {
    EXPECT_THROW(Schedule{config}, Error);
    config.on_unfinished = OnUnfinished::kClamp;
    EXPECT_TRUE(Schedule(config, measurements).finished(config.total_steps));
  }
}

TEST_P(RandomSchedule, IsFinishedByEachOfTheChangesThatItsRefusalNames) {
  const ScheduleConfig config = draw_mixed_config();
  const std::vector<Unfinished> late = unfinished(config);
  ScheduleConfig longer = config;
  ScheduleConfig faster = config;
  bool has_period = !late.empty();
  for (const Unfinished& block : late) {
    longer.total_steps = std::max(longer.total_steps, block.arrival);
    has_period = has_period && block.largest_period.has_value();
  }
  EXPECT_TRUE(unfinished(longer).empty());
  if (!has_period) {
    return;
  }
  const std::int64_t period =
      *std::ranges::min_element(late, {}, &Unfinished::largest_period)->largest_period;
  for (ScheduledBlock& block : faster.blocks) {
    if (std::ranges::find(late, block.name, &Unfinished::block) != late.end()) {
      std::get<Geometric>(block.rule).period = period;
    }
  }
  EXPECT_TRUE(unfinished(faster).empty());
}

/// Ends a block at `target` bits, or at its start below.
void raise_target(ScheduledBlock& block, int target) {
  if (auto* geometric = std::get_if<Geometric>(&block.rule)) {
    geometric->target_bits =
        std::max(geometric->target_bits, std::min(target, geometric->start_bits));
    return;
  }
  Table raised;
  for (const auto& [step, bits] : std::get<Table>(block.rule)) {
    const int kept = std::max(bits, target);
    if (raised.empty()) {
      raised.emplace(step, bits);
    } else if (kept < raised.rbegin()->second) {
      raised.emplace(step, kept);
    }
  }
  block.rule = std::move(raised);
}

TEST_P(RandomSchedule, IsFinishedByTheTargetThatItsRefusalNames) {
  ScheduleConfig config = draw_mixed_config();
  config.on_unfinished = OnUnfinished::kError;
  try {
    Schedule{config};
  } catch (const Error& error) {
    const std::string text = error.what();
    const std::string before = "target_bits >= ";
    const std::size_t at = text.find(before);
    ASSERT_NE(at, std::string::npos) << text;
    const int target = std::stoi(text.substr(at + before.size()));
    const auto late_with = [&](int bits) {
      ScheduleConfig changed = config;
      for (ScheduledBlock& block : changed.blocks) {
        raise_target(block, bits);
      }
      return unfinished(changed).size();
    };
    EXPECT_EQ(late_with(target), 0U) << text;
    EXPECT_GT(late_with(target - 1), 0U) << text;
  }
}

/// Ranks and resumed runs make the schedule from a text, and may list the blocks in another order.
TEST_P(RandomSchedule, IsTheSameFromItsTextAndInAnyOrderOfBlocks) {
  const ScheduleConfig config = draw_mixed_config();
  const std::vector<Measurement> measurements = draw_measurements(config);
  const Schedule schedule(config, measurements);
  const Schedule copy = from_json(to_json(schedule));
  EXPECT_EQ(copy.plan(), schedule.plan());
  EXPECT_EQ(to_json(copy), to_json(schedule));

  ScheduleConfig reversed = config;
  std::ranges::reverse(reversed.blocks);
  std::vector<Measurement> reversed_measurements = measurements;
  for (Measurement& measurement : reversed_measurements) {
    std::ranges::reverse(measurement.sensitivities);
  }
  Plan expected = schedule.plan();
  std::ranges::reverse(expected);
  EXPECT_EQ(plan(reversed, reversed_measurements), expected);
}

TEST_P(RandomSchedule, ClampedBlocksAllArriveInTime) {
  ScheduleConfig config = draw_mixed_config();
  config.on_unfinished = OnUnfinished::kClamp;
  const Schedule schedule(config, draw_measurements(config));
  EXPECT_TRUE(schedule.finished(config.total_steps));
}

TEST_P(RandomSchedule, ThePlanIsWhatHappensStepByStep) {
  const ScheduleConfig config = draw_config(GetParam() % 2 == 0);
  const std::vector<Measurement> measurements = draw_measurements(config);
  Schedule walked(config);
  std::vector<std::vector<int>> history;
  std::size_t next = 0;
  for (std::int64_t step = 0; step <= config.total_steps; ++step) {
    // What a trainer does: read the widths of this step, then measure.
    auto& bits = history.emplace_back();
    for (std::int64_t block = 0; block < walked.num_blocks(); ++block) {
      bits.push_back(walked.bits_at(block, step));
    }
    while (next < measurements.size() && measurements[next].step == step) {
      walked.set_sensitivities(step, measurements[next++].sensitivities);
    }
  }
  const Plan planned = plan(config, measurements);
  for (std::int64_t step = 0; step <= config.total_steps; ++step) {
    for (std::size_t block = 0; block < planned.size(); ++block) {
      ASSERT_EQ(bits_at(planned[block], step), history[static_cast<std::size_t>(step)][block])
          << "block " << block << ", step " << step;
    }
  }
}

/// Expects each drop to lie within its bounds, or at most `slack` steps beyond them.
void expect_within(const Bounds& limits, const Plan& drops, std::int64_t slack) {
  for (std::size_t block = 0; block < drops.size(); ++block) {
    for (std::size_t i = 0; i < drops[block].size(); ++i) {
      EXPECT_GE(drops[block][i].step, limits.earliest[block][i].step - slack);
      EXPECT_LE(drops[block][i].step, limits.latest[block][i].step + slack);
    }
  }
}

TEST_P(RandomSchedule, MeasurementsKeepEveryDropWithinItsBounds) {
  const ScheduleConfig config = draw_config(false);
  expect_within(bounds(config), plan(config, draw_measurements(config)), 0);
}

TEST_P(RandomSchedule, OneMeasurementKeepsTheDropsOfFinishAtWithinAStepOfTheirBounds) {
  const ScheduleConfig config = draw_config(true);
  const Measurement measurement{draw(0, config.total_steps),
                                draw_sensitivities(config.blocks.size())};
  expect_within(bounds(config), plan(config, std::vector{measurement}), 1);
}

TEST_P(RandomSchedule, AScheduleThatIsAcceptedFinishesWhateverIsMeasured) {
  ScheduleConfig config = draw_config(false);
  config.on_unfinished = OnUnfinished::kError;
  config.total_steps = 1;
  for (const Unfinished& late : unfinished(config)) {
    config.total_steps = std::max(config.total_steps, late.arrival);
  }
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(Schedule(config, draw_measurements(config)).finished(config.total_steps));
  }
}

TEST_P(RandomSchedule, TheLargestPeriodFitsAndTheNextDoesNot) {
  const ScheduleConfig config = draw_config(false);
  for (const Unfinished& late : unfinished(config)) {
    ScheduleConfig single = config;
    single.blocks = {*std::find_if(config.blocks.begin(), config.blocks.end(),
                                   [&](const auto& block) { return block.name == late.block; })};
    auto& rule = std::get<Geometric>(single.blocks[0].rule);
    rule.period = late.largest_period.value_or(0) + 1;
    EXPECT_EQ(unfinished(single).size(), 1U);
    if (late.largest_period) {
      rule.period = *late.largest_period;
      EXPECT_TRUE(unfinished(single).empty());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomSchedule, ::testing::Range(0, 60));

}  // namespace
}  // namespace moq::schedule
