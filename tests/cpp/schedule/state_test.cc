#include "csrc/schedule/state.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/cpp/error_of.h"

namespace moq::schedule {
namespace {

using test::error_of;

Schedule measured() {
  Schedule schedule(
      {.blocks = {{"layers.\"0\"", Geometric{.period = 3, .growth = 1.1, .finish_at = 0.6}},
                  {"head", Table{{0, 16}, {5, 8}}}},
       .total_steps = 425,
       .stretch_rule = "linear"});
  schedule.set_sensitivities(17, {1.0 / 3.0, 0.0});
  schedule.set_sensitivities(40, {1.0, 0.5});
  return schedule;
}

/// The state of measured() with `from` replaced by `to`.
std::string edited(const std::string& from, const std::string& to) {
  std::string state = to_json(measured());
  const std::size_t position = state.find(from);
  EXPECT_NE(position, std::string::npos) << from << " is not in " << state;
  return state.replace(position, from.size(), to);
}

TEST(ScheduleState, GivesTheSamePlanAndTheSameText) {
  const Schedule schedule = measured();
  Schedule resumed = from_json(to_json(schedule));
  EXPECT_EQ(resumed.plan(), schedule.plan());
  EXPECT_EQ(to_json(resumed), to_json(schedule));
}

TEST(ScheduleState, HoldsAScheduleWithoutFinishAt) {
  const Schedule schedule({.blocks = {{"a", Geometric{}}}, .total_steps = 255});
  const Schedule resumed = from_json(to_json(schedule));
  EXPECT_FALSE(std::get<Geometric>(resumed.config().blocks[0].rule).finish_at.has_value());
}

TEST(ScheduleState, HoldsACounter) {
  const Schedule schedule(
      {.blocks = {{"a", Geometric{.start_bits = 12, .period = 10, .counts_per_step = 72}}},
       .total_steps = 200});
  EXPECT_EQ(from_json(to_json(schedule)).plan(), schedule.plan());
}

struct BadState {
  std::string from;
  std::string to;
  std::string message;
};

class RefusedState : public ::testing::TestWithParam<BadState> {};

TEST_P(RefusedState, NamesTheKey) {
  const std::string state = edited(GetParam().from, GetParam().to);
  const std::string error = error_of([&] { from_json(state); });
  EXPECT_NE(error.find(GetParam().message), std::string::npos) << error << " for " << state;
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedState,
    ::testing::Values(
        BadState{"\"version\": 3", "\"version\": 2", "version must be 3, got 2"},
        BadState{"\"total_steps\": 425, ", "", "schedule state: expected the key 'total_steps'"},
        BadState{"\"total_steps\": 425", "\"total_steps\": 4.5",
                 "schedule state: total_steps: expected an integer"},
        BadState{"\"period\": 3, ", "", "schedule state: blocks[0]: expected the key 'period'"},
        BadState{"\"start_bits\": 16", "\"start_bits\": 4294967304",
                 "blocks[0]: start_bits: expected a width in [1, 32] bits, got 4294967304"},
        BadState{"[0, 16]", "[0]", "blocks[1]: table: expected pairs of step and bits, got 1"},
        BadState{"[0, 16]", "[0, 16, 3]",
                 "blocks[1]: table: expected pairs of step and bits, got 3"},
        BadState{"\"step\": 40", "\"step\": 4", "step must be in [17, "},
        BadState{"\"sensitivities\": [1.0, 0.5]", "\"sensitivities\": [1.0]", "got 1 for 2 blocks"},
        BadState{"\"stretch_rule\": \"linear\"", "\"stretch_rule\": \"steep\"", "got 'steep'"}));

}  // namespace
}  // namespace moq::schedule
