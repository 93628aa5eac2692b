#include "csrc/schedule/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "csrc/schedule/config.h"
#include "kernels/common/check.h"
#include "tests/cpp/error_of.h"

namespace moq::schedule {
namespace {

using test::error_of;

/// Expects `call` to throw moq::Error with a message that has all the `parts`.
void expect_error(const std::function<void()>& call, const std::vector<std::string>& parts) {
  const std::string error = error_of(call);
  for (const std::string& part : parts) {
    EXPECT_NE(error.find(part), std::string::npos) << "'" << part << "' is missing in: " << error;
  }
}

ScheduledBlock block(Geometric rule, std::string name = "layers.0") {
  return {.name = std::move(name), .rule = rule};
}

TEST(GeometricPlan, DoublesTheResidenceTimeAfterEachDrop) {
  const Plan drops = plan({.blocks = {block({.period = 10, .offset = 5})}, .total_steps = 3000});
  const BlockPlan expected = {{0, 16},   {15, 15},  {35, 14},  {75, 13}, {155, 12},
                              {315, 11}, {635, 10}, {1275, 9}, {2555, 8}};
  EXPECT_EQ(drops.at(0), expected);
}

TEST(GeometricPlan, GrowthOneDropsEveryPeriod) {
  const Plan drops =
      plan({.blocks = {block({.start_bits = 8, .target_bits = 4, .period = 7, .growth = 1.0})},
            .total_steps = 28});
  const BlockPlan expected = {{0, 8}, {7, 7}, {14, 6}, {21, 5}, {28, 4}};
  EXPECT_EQ(drops.at(0), expected);
}

TEST(GeometricPlan, FractionalGrowthRoundsEachDropUp) {
  const Plan drops =
      plan({.blocks = {block({.start_bits = 8, .target_bits = 5, .period = 3, .growth = 1.5})},
            .total_steps = 15});
  const BlockPlan expected = {{0, 8}, {3, 7}, {8, 6}, {15, 5}};  // 3, 3 + 4.5, 7.5 + 6.75
  EXPECT_EQ(drops.at(0), expected);
}

TEST(GeometricPlan, GrowthIsRoundedToTheNearestFraction) {
  // 1.1 * 2^16 = 72089.6: the nearest multiple of 2^-16 is the one above.
  const std::vector<std::int64_t> times =
      residence_times({.start_bits = 10, .target_bits = 8, .period = kOne, .growth = 1.1});
  EXPECT_EQ(times, (std::vector<std::int64_t>{kOne * kOne, kOne * 72090}));
}

/// DeepSpeed's settings for MRPC, whose counter grows by 72 a step: 10, 20, 40, 80 unless measured,
/// 10, 100, 1000, 10000 for the most sensitive layer.
ScheduleConfig counted(OnUnfinished on_unfinished = OnUnfinished::kError) {
  const Geometric rule{.start_bits = 12, .period = 10, .offset = 3, .counts_per_step = 72};
  return {.blocks = {block(rule, "a"), block(rule, "b")},
          .total_steps = 200,
          .on_unfinished = on_unfinished,
          .stretch_rule = "stepped"};
}

TEST(CountedPlan, FallsAsACounterReachesCountsThatGrow) {
  const Plan drops = plan(counted());
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 12}, {4, 11}, {4, 10}, {4, 9}, {5, 8}}));
}

TEST(CountedPlan, ASensitivityMultipliesEachCountOnceMoreThanTheOneBefore) {
  const Plan drops = plan(counted(), std::vector<Measurement>{{0, {0.0, 1.0}}});
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 12}, {4, 11}, {4, 10}, {4, 9}, {5, 8}}));
  EXPECT_EQ(drops.at(1), BlockPlan({{0, 12}, {4, 11}, {5, 10}, {17, 9}, {142, 8}}));
  EXPECT_EQ(bounds(counted()).latest.at(0), drops.at(1));
}

TEST(CountedPlan, ALaterMeasurementStretchesOnlyWhatLiesAhead) {
  const Plan drops = plan(counted(), std::vector<Measurement>{{0, {1.0, 1.0}}, {17, {0.0, 1.0}}});
  // 1008 of 10000 stretched counts are covered, 8.064 of 80: 71.936 are left.
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 12}, {4, 11}, {5, 10}, {17, 9}, {18, 8}}));
  EXPECT_EQ(drops.at(1), BlockPlan({{0, 12}, {4, 11}, {5, 10}, {17, 9}, {142, 8}}));
}

TEST(CountedPlan, LateDropsAreRefusedOrComeAtTheLastStep) {
  ScheduleConfig config = counted();
  config.total_steps = 100;
  EXPECT_EQ(unfinished(config).at(0).arrival, 142);
  EXPECT_EQ(unfinished(config).at(0).largest_period, 6);  // 6000 / 72 + 3 = 87
  config.on_unfinished = OnUnfinished::kClamp;
  const Plan drops = plan(config, std::vector<Measurement>{{0, {0.0, 1.0}}});
  EXPECT_EQ(drops.at(1), BlockPlan({{0, 12}, {4, 11}, {5, 10}, {17, 9}, {100, 8}}));
}

TEST(CountedPlan, CountsThatNoTrainingReachesAreNoError) {
  ScheduleConfig config = counted(OnUnfinished::kAllow);
  std::get<Geometric>(config.blocks[0].rule) = {
      .start_bits = 32, .target_bits = 1, .period = 1000, .counts_per_step = 1};
  const Plan drops = plan(config, std::vector<Measurement>{{0, {1.0, 1.0}}});
  EXPECT_GT(drops.at(0).back().step, config.total_steps);
  EXPECT_TRUE(std::ranges::is_sorted(drops.at(0), {}, &Drop::step));
}

TEST(GeometricPlan, EqualStartAndTargetNeverDrops) {
  const Plan drops = plan(
      {.blocks = {block({.start_bits = 8, .target_bits = 8, .period = 50})}, .total_steps = 1});
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 8}}));
}

TEST(GeometricPlan, OneStepOfTrainingHoldsOneDrop) {
  const Plan drops =
      plan({.blocks = {block({.start_bits = 9, .target_bits = 8})}, .total_steps = 1});
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 9}, {1, 8}}));
}

TEST(TablePlan, IsTheTable) {
  const Plan drops =
      plan({.blocks = {{"head", Table{{0, 16}, {10, 12}, {11, 8}}}}, .total_steps = 20});
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 16}, {10, 12}, {11, 8}}));
}

TEST(FinishAt, BringsTheSlowestBlockToTheDeadlineAndKeepsRatios) {
  const Plan drops = plan({.blocks = {block({.start_bits = 10, .period = 1, .finish_at = 0.6}),
                                      block({.start_bits = 10, .period = 3, .finish_at = 0.6})},
                           .total_steps = 100});
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 10}, {7, 9}, {20, 8}}));  // 60 / 9 = 6.67, then 20
  EXPECT_EQ(drops.at(1), BlockPlan({{0, 10}, {20, 9}, {60, 8}}));
}

TEST(FinishAt, LetsSeveralWidthsFallInOneStep) {
  const Plan drops = plan({.blocks = {block({.finish_at = 1.0})}, .total_steps = 4});
  const BlockPlan expected = {{0, 16}, {1, 15}, {1, 14}, {1, 13}, {1, 12},
                              {1, 11}, {1, 10}, {2, 9},  {4, 8}};
  EXPECT_EQ(drops.at(0), expected);
  EXPECT_EQ(bits_at(drops.at(0), 0), 16);
  EXPECT_EQ(bits_at(drops.at(0), 1), 10);
}

TEST(FinishAt, ReadsDecimalFractionsAsWritten) {
  const ScheduleConfig config{.blocks = {block({.finish_at = 0.29})}, .total_steps = 100};
  EXPECT_EQ(plan(config).at(0).back().step, 29);  // 0.29 * 100 is 28.999… in binary
}

TEST(FinishAt, CountsTheOffsetInFullSteps) {
  const Plan drops =
      plan({.blocks = {block({.start_bits = 9, .period = 1, .offset = 50, .finish_at = 0.8})},
            .total_steps = 100});
  EXPECT_EQ(drops.at(0), BlockPlan({{0, 9}, {80, 8}}));
}

TEST(FinishAt, RefusesAnOffsetBeyondTheDeadlineWithTheSmallestChange) {
  const auto make = [](std::int64_t offset, std::int64_t total, double finish_at) {
    return plan(
        {.blocks = {block({.offset = offset, .finish_at = finish_at})}, .total_steps = total});
  };
  expect_error([&] { make(60, 100, 0.6); },
               {"'layers.0'", "offset <= 59", "total_steps >= 102", "finish_at >= 0.61"});
  EXPECT_NO_THROW(make(59, 100, 0.6));
  EXPECT_NO_THROW(make(60, 102, 0.6));
  EXPECT_NO_THROW(make(60, 100, 0.61));
  expect_error([&] { make(60, 101, 0.6); }, {"total_steps >= 102"});
}

TEST(FinishAt, RefusesATrainingTooShortForAnyDrop) {
  expect_error([] { plan({.blocks = {block({.finish_at = 0.6})}, .total_steps = 1}); },
               {"total_steps >= 2"});
}

TEST(FinishAt, OfATinyShareIsRefusedWithTheTrainingLongEnoughForIt) {
  const auto make = [](double finish_at, std::int64_t total) {
    return plan({.blocks = {block({.finish_at = finish_at})}, .total_steps = total});
  };
  expect_error([&] { make(1e-11, 100); }, {"total_steps >= 99999900000"});
  EXPECT_NO_THROW(make(1e-11, 99999900000));
  expect_error([&] { make(1e-11, 99999899999); }, {"total_steps >= 99999900000"});
}

TEST(FinishAt, TooSmallForAnyTrainingIsRefusedAtOnce) {
  for (const double finish_at : {1e-13, 1e-18, 1e-20, 1e-300}) {
    try {
      plan({.blocks = {block({.finish_at = finish_at})}, .total_steps = 100});
      ADD_FAILURE() << "no error for " << finish_at;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find("total_steps >="), std::string::npos)
          << error.what();
    }
  }
}

TEST(FinishAt, IsAdvisedWithASixthDecimalThatIsEnough) {
  const ScheduleConfig config{.blocks = {block({.offset = 3333333, .finish_at = 0.2})},
                              .total_steps = 10000000};
  expect_error([&] { plan(config); }, {"finish_at >= 0.333334"});
  ScheduleConfig longer = config;
  std::get<Geometric>(longer.blocks[0].rule).finish_at = 0.333334;
  EXPECT_NO_THROW(plan(longer));
}

TEST(FinishAt, IsMetByTheSlowestOfEachShareOnItsOwn) {
  const Plan drops = plan({.blocks = {block({.start_bits = 9, .period = 7, .finish_at = 0.5}),
                                      block({.start_bits = 9, .period = 14, .finish_at = 0.5}),
                                      block({.start_bits = 9, .period = 3, .finish_at = 0.8}),
                                      block({.start_bits = 9, .period = 30}),
                                      {"head", Table{{0, 16}, {99, 8}}}},
                           .total_steps = 100});
  EXPECT_EQ(drops.at(0).back(), (Drop{25, 8}));
  EXPECT_EQ(drops.at(1).back(), (Drop{50, 8}));
  EXPECT_EQ(drops.at(2).back(), (Drop{80, 8}));
  EXPECT_EQ(drops.at(3).back(), (Drop{30, 8}));
  EXPECT_EQ(drops.at(4).back(), (Drop{99, 8}));
}

TEST(FinishAt, OfSomeBlocksDoesNotExcuseTheOthers) {
  expect_error(
      [] {
        Schedule({.blocks = {block({.finish_at = 1.0}),
                             block({.period = 10}, "layers.1"),
                             {"head", Table{{0, 16}, {9000, 8}}}},
                  .total_steps = 2000});
      },
      {"2 of 3", "'head', arrives at step 9000", "total_steps >= 9000"});
}

TEST(Unfinished, IsRefusedWithChangesThatEachFixIt) {
  const auto make = [](std::int64_t period, std::int64_t total, int target) {
    return Schedule({.blocks = {block({.target_bits = target, .period = period}, "layers.3")},
                     .total_steps = total});
  };
  expect_error([&] { make(10, 2000, 8); }, {"'layers.3'", "step 2550", "period <= 7",
                                            "total_steps >= 2550", "target_bits >= 9"});
  EXPECT_NO_THROW(make(7, 2000, 8));
  expect_error([&] { make(8, 2000, 8); }, {"period <= 7"});
  EXPECT_NO_THROW(make(10, 2550, 8));
  expect_error([&] { make(10, 2549, 8); }, {"total_steps >= 2550"});
  EXPECT_NO_THROW(make(10, 2000, 9));
}

TEST(Unfinished, OffersThePeriodThatIsShortEnoughForAllLateBlocks) {
  const auto make = [](std::int64_t slow, std::int64_t slower) {
    return Schedule({.blocks = {block({.start_bits = 9, .period = slow}),
                                block({.start_bits = 16, .period = slower}, "layers.1")},
                     .total_steps = 2550});
  };
  expect_error([&] { make(3000, 30); }, {"2 of 2", "'layers.1', arrives at step 7650",
                                         "Smallest change: period <= 10 for all of these, or"});
  EXPECT_NO_THROW(make(10, 10));
  expect_error([&] { make(10, 11); }, {"1 of 2", "Smallest change: its period <= 10, or"});
}

TEST(Unfinished, OffersTheTargetThatAllLateBlocksReach) {
  // At step 100 the blocks have fallen once and five times, to 15 and 10 bits.
  const auto make = [](int target) {
    return Schedule({.blocks = {block({.target_bits = target, .period = 60}),
                                block({.start_bits = 15,
                                       .target_bits = std::min(target, 8),
                                       .period = 20,
                                       .growth = 1.0},
                                      "layers.1")},
                     .total_steps = 100});
  };
  expect_error([&] { make(8); }, {"2 of 2", "target_bits >= 15"});
  expect_error([&] { make(14); }, {"target_bits >= 15"});
}

TEST(Unfinished, OffersNoPeriodWhereNoneFits) {
  const ScheduleConfig config{.blocks = {block({.period = 2})}, .total_steps = 254};
  EXPECT_FALSE(unfinished(config).at(0).largest_period.has_value());
  expect_error([&] { Schedule{config}; }, {"Smallest change: total_steps >= 510"});
}

TEST(Unfinished, OffersForATableWhatATableHas) {
  const ScheduledBlock head{"head", Table{{0, 16}, {5, 12}, {90, 8}}};
  const std::string text = error_of([&] { Schedule{{.blocks = {head}, .total_steps = 60}}; });
  EXPECT_NE(text.find("total_steps >= 90, or target_bits >= 12, or no step of the table beyond 60"),
            std::string::npos)
      << text;
  EXPECT_EQ(text.find("period"), std::string::npos) << text;
  expect_error(
      [&] {
        Schedule{{.blocks = {head, block({.period = 10})}, .total_steps = 60}};
      },
      {"finish_at (at most 1.0) instead of period", "no step of the table beyond 60"});
}

TEST(Unfinished, OffersNothingImpossibleToATrainingOfOneStep) {
  const auto make = [](std::int64_t steps, double finish_at) {
    return Schedule({.blocks = {block({.finish_at = finish_at})}, .total_steps = steps});
  };
  const std::string text = error_of([&] { make(1, 0.6); });
  EXPECT_TRUE(text.ends_with("Smallest change: total_steps >= 2, or finish_at >= 1.0")) << text;
  EXPECT_NO_THROW(make(2, 0.6));
  EXPECT_NO_THROW(make(1, 1.0));
}

TEST(Unfinished, CountsTheLongestStretchOfAnAdaptiveSchedule) {
  const ScheduleConfig config{
      .blocks = {block({})}, .total_steps = 1274, .stretch_rule = "stepped"};
  expect_error([&] { Schedule{config}; }, {"1275", "sensitivity is 1"});
  ScheduleConfig longer = config;
  longer.total_steps = 1275;
  EXPECT_NO_THROW(Schedule{longer});
}

TEST(Unfinished, ClampShortensOnlyTheLateBlock) {
  const Schedule schedule({.blocks = {block({.start_bits = 10, .period = 10}),
                                      block({.start_bits = 10, .period = 100})},
                           .total_steps = 60,
                           .on_unfinished = OnUnfinished::kClamp});
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 10}, {10, 9}, {30, 8}}));
  EXPECT_EQ(schedule.plan().at(1), BlockPlan({{0, 10}, {20, 9}, {60, 8}}));
}

TEST(Unfinished, ClampMovesLateTableEntriesAndOffsetsIntoTheTraining) {
  const Schedule schedule({.blocks = {{"head", Table{{0, 16}, {5, 12}, {90, 8}}},
                                      block({.start_bits = 9, .period = 3, .offset = 70})},
                           .total_steps = 60,
                           .on_unfinished = OnUnfinished::kClamp});
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 16}, {5, 12}, {60, 8}}));
  EXPECT_EQ(schedule.plan().at(1), BlockPlan({{0, 9}, {60, 8}}));
}

TEST(Unfinished, AllowEndsAtTheWidthReached) {
  const Schedule schedule({.blocks = {block({.period = 10})},
                           .total_steps = 100,
                           .on_unfinished = OnUnfinished::kAllow});
  EXPECT_EQ(schedule.bits_at(0, 100), 13);
  EXPECT_FALSE(schedule.finished(100));
  const std::vector<Unfinished> late = unfinished(schedule.config());
  ASSERT_EQ(late.size(), 1U);
  EXPECT_EQ(late[0].arrival, 2550);
  EXPECT_EQ(late[0].bits, 13);
  EXPECT_FALSE(late[0].largest_period.has_value());
}

TEST(Sensitivities, StretchTheResidenceTimesAhead) {
  Schedule schedule(
      {.blocks = {block({.start_bits = 10, .period = 10}), block({.start_bits = 10, .period = 10})},
       .total_steps = 150,
       .stretch_rule = "stepped"});
  schedule.set_sensitivities(0, {0.5, 1.0});
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 10}, {30, 9}, {90, 8}}));
  EXPECT_EQ(schedule.plan().at(1), BlockPlan({{0, 10}, {50, 9}, {150, 8}}));
}

TEST(Sensitivities, ProRateTheWidthTheyFallInto) {
  Schedule schedule({.blocks = {block({.start_bits = 10, .period = 10})},
                     .total_steps = 150,
                     .stretch_rule = "stepped"});
  schedule.set_sensitivities(14, {0.25});  // 16 of the 20 steps at 9 bits are left: 32 stretched
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 10}, {10, 9}, {46, 8}}));
  schedule.set_sensitivities(30, {0.0});  // 16 of those 32 are left: 8 unstretched
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 10}, {10, 9}, {38, 8}}));
}

TEST(Sensitivities, MeasuredAtARoundedDropDoNotPushTheArrivalBeyondTotalSteps) {
  Schedule schedule({.blocks = {block({.start_bits = 11, .period = 1, .growth = 1.1})},
                     .total_steps = 17,  // 5 (1 + 1.1 + 1.21) = 16.55
                     .stretch_rule = "stepped"});
  schedule.set_sensitivities(0, {1.0});
  schedule.set_sensitivities(11, {1.0});  // the second drop, at 10.5
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 11}, {5, 10}, {11, 9}, {17, 8}}));
}

TEST(Sensitivities, WithinFinishAtTheMostSensitiveArrivesAtTheDeadline) {
  Schedule schedule({.blocks = {block({.start_bits = 10, .finish_at = 0.6}),
                                block({.start_bits = 10, .finish_at = 0.6})},
                     .total_steps = 100,
                     .stretch_rule = "stepped"});
  schedule.set_sensitivities(0, {0.0, 1.0});
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 10}, {4, 9}, {12, 8}}));
  EXPECT_EQ(schedule.plan().at(1), BlockPlan({{0, 10}, {20, 9}, {60, 8}}));
}

TEST(Sensitivities, LinearRuleUsesTheWholeRange) {
  Schedule schedule({.blocks = {block({.start_bits = 9, .period = 10})},
                     .total_steps = 50,
                     .stretch_rule = "linear"});
  schedule.set_sensitivities(0, {0.3});
  EXPECT_EQ(schedule.plan().at(0).back().step, 22);
}

TEST(Sensitivities, LeaveTablesAlone) {
  Schedule schedule({.blocks = {{"head", Table{{0, 16}, {10, 8}}}, block({.finish_at = 1.0})},
                     .total_steps = 100,
                     .stretch_rule = "stepped"});
  schedule.set_sensitivities(3, {1.0, 0.0});
  EXPECT_EQ(schedule.plan().at(0), BlockPlan({{0, 16}, {10, 8}}));
}

TEST(Sensitivities, AfterTheLastDropChangeNothing) {
  Schedule schedule(
      {.blocks = {block({.finish_at = 0.5})}, .total_steps = 100, .stretch_rule = "stepped"});
  const Plan before = schedule.plan();
  schedule.set_sensitivities(50, {1.0});
  EXPECT_EQ(schedule.plan(), before);
}

TEST(Sensitivities, ThatAreRefusedLeaveTheScheduleUnchanged) {
  Schedule schedule(
      {.blocks = {block({.finish_at = 0.5})}, .total_steps = 100, .stretch_rule = "stepped"});
  schedule.set_sensitivities(10, {0.5});
  const Plan before = schedule.plan();
  expect_error([&] { schedule.set_sensitivities(9, {0.5}); }, {"got 9"});
  expect_error([&] { schedule.set_sensitivities(20, {0.5, 0.5}); }, {"got 2 for 1 blocks"});
  expect_error([&] { schedule.set_sensitivities(20, {1.5}); }, {"'layers.0'", "got 1.5"});
  expect_error([&] { schedule.set_sensitivities(20, {std::nan("")}); }, {"must be in [0, 1]"});
  EXPECT_EQ(schedule.plan(), before);
  EXPECT_EQ(schedule.measurements().size(), 1U);
}

TEST(Sensitivities, AreRefusedByAScheduleThatDoesNotAdapt) {
  Schedule schedule({.blocks = {block({})}, .total_steps = 300});
  expect_error([&] { schedule.set_sensitivities(0, {0.5}); }, {"stretch_rule must be"});
}

struct BadConfig {
  ScheduleConfig config;
  std::string message;
};

class RefusedConfig : public ::testing::TestWithParam<BadConfig> {};

TEST_P(RefusedConfig, NamesTheValue) {
  expect_error([&] { plan(GetParam().config); }, {GetParam().message});
}

INSTANTIATE_TEST_SUITE_P(
    All, RefusedConfig,
    ::testing::Values(
        BadConfig{{.blocks = {block({.period = 0})}, .total_steps = 9}, "period of 'layers.0'"},
        BadConfig{{.blocks = {block({.start_bits = 8, .period = kMaxSteps + 1})}, .total_steps = 9},
                  "period of 'layers.0' must be in [1, 2^40]"},
        BadConfig{{.blocks = {block({.offset = kMaxSteps + 1})}, .total_steps = 9},
                  "offset of 'layers.0' must be in [0, 2^40]"},
        BadConfig{{.blocks = {block({})}, .total_steps = kMaxSteps + 1},
                  "total_steps must be in [1, 2^40]"},
        BadConfig{{.blocks = {{"t", Table{{0, 16}, {kMaxSteps + 1, 8}}}}, .total_steps = 9},
                  "the steps of the table of 't' must be <= 2^40, got 1099511627777"},
        BadConfig{{.blocks = {block({.start_bits = 4})}, .total_steps = 9}, "start_bits of"},
        BadConfig{{.blocks = {block({.start_bits = 33})}, .total_steps = 9}, "start_bits of"},
        BadConfig{{.blocks = {block({.target_bits = 0})}, .total_steps = 9}, "target_bits of"},
        BadConfig{{.blocks = {block({.offset = -1})}, .total_steps = 9}, "offset of"},
        BadConfig{{.blocks = {block({.growth = 0.5})}, .total_steps = 9}, "growth of"},
        BadConfig{{.blocks = {block({.growth = std::nan("")})}, .total_steps = 9}, "growth of"},
        BadConfig{
            {.blocks = {block({.period = std::int64_t{1} << 40, .growth = 16})}, .total_steps = 9},
            "must sum to at most 2^44 steps"},
        BadConfig{{.blocks = {block({.counts_per_step = -1})}, .total_steps = 9},
                  "counts_per_step of 'layers.0' must be in [0, 2^20], got -1"},
        BadConfig{{.blocks = {block({.finish_at = 0.5, .counts_per_step = 6})}, .total_steps = 9},
                  "counts_per_step of 'layers.0' must be 0 with finish_at"},
        BadConfig{{.blocks = {block({})}, .total_steps = 0}, "total_steps must be"},
        BadConfig{{.blocks = {block({.finish_at = 0.0})}, .total_steps = 9},
                  "finish_at of 'layers.0'"},
        BadConfig{{.blocks = {block({.finish_at = 1.1})}, .total_steps = 9},
                  "finish_at of 'layers.0'"},
        BadConfig{{.blocks = {block({})}, .total_steps = 9, .stretch_rule = "steep"},
                  "got 'steep'"},
        BadConfig{{.blocks = {{"t", Table{}}}, .total_steps = 9}, "an empty table"},
        BadConfig{{.blocks = {{"t", Table{{3, 8}}}}, .total_steps = 9}, "entry at step 0"},
        BadConfig{{.blocks = {{"t", Table{{0, 8}, {3, 8}}}}, .total_steps = 9},
                  "got 8 bits at step 3 after 8"}));

TEST(OnUnfinishedName, RoundTripsAndRefusesOthers) {
  EXPECT_EQ(parse_on_unfinished(name_of(OnUnfinished::kClamp)), OnUnfinished::kClamp);
  expect_error([] { parse_on_unfinished("warn"); }, {"got 'warn'"});
}

TEST(BitsAt, RefusesABlockOrStepThatDoesNotExist) {
  const Schedule schedule({.blocks = {block({})}, .total_steps = 300});
  expect_error([&] { schedule.bits_at(1, 0); }, {"[0, 1), got 1"});
  expect_error([&] { schedule.bits_at(0, -1); }, {"got -1"});
}

TEST(EmptySchedule, IsFinished) {
  EXPECT_TRUE(Schedule({.blocks = {}, .total_steps = 1}).finished(0));
}

}  // namespace
}  // namespace moq::schedule
