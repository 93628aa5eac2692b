// The Pareto front of target widths against all choices, tried one by one.
#include "csrc/schedule/target_bits.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "tests/cpp/error_of.h"

namespace moq::schedule {
namespace {

using test::error_of;
using Choice = std::vector<std::int64_t>;

/// Cost and loss of one option per block, added up in the order of the blocks.
FrontPoint total(const std::vector<BlockOptions>& blocks, const Choice& choice) {
  FrontPoint sum;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const WidthOption& option = blocks[i].options[static_cast<std::size_t>(choice[i])];
    sum = {sum.cost + option.cost, sum.loss + option.loss};
  }
  return sum;
}

/// Counts up through all choices; false after the last one.
bool advance(const std::vector<BlockOptions>& blocks, Choice& choice) {
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (++choice[i] < static_cast<std::int64_t>(blocks[i].options.size())) {
      return true;
    }
    choice[i] = 0;
  }
  return false;
}

/// All choices that no other equals or beats in both, by trying every one.
std::vector<FrontPoint> brute_force(const std::vector<BlockOptions>& blocks) {
  std::vector<FrontPoint> all;
  Choice choice(blocks.size(), 0);
  do {
    all.push_back(total(blocks, choice));
  } while (advance(blocks, choice));
  std::sort(all.begin(), all.end(), [](const FrontPoint& a, const FrontPoint& b) {
    return a.cost < b.cost || (a.cost == b.cost && a.loss < b.loss);
  });
  std::vector<FrontPoint> front;
  for (const FrontPoint& point : all) {
    if (front.empty() || point.loss < front.back().loss) {
      front.push_back(point);
    }
  }
  return front;
}

class RandomBlocks : public ::testing::TestWithParam<int> {
 protected:
  std::int64_t draw(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
  }

  /// Few and small costs and losses meet in ties; large ones are all different. Losses need not
  /// fall with the cost.
  std::vector<BlockOptions> draw_blocks() {
    const bool ties = draw(0, 1) == 0;
    std::vector<BlockOptions> blocks;
    for (std::int64_t i = draw(1, 7); i > 0; --i) {
      BlockOptions& block = blocks.emplace_back();
      block.name = std::to_string(i);
      for (std::int64_t j = draw(1, 4); j > 0; --j) {
        const double loss = ties ? static_cast<double>(draw(0, 4))
                                 : std::exp(static_cast<double>(draw(-9000, 9000)) / 300.0);
        block.options.push_back({.cost = draw(0, ties ? 4 : 1'000'000'000), .loss = loss});
      }
    }
    return blocks;
  }

  std::mt19937 generator_{static_cast<unsigned>(GetParam())};
};

INSTANTIATE_TEST_SUITE_P(Seeds, RandomBlocks, ::testing::Range(0, 400));

TEST_P(RandomBlocks, TheFrontIsThatOfAllChoices) {
  const std::vector<BlockOptions> blocks = draw_blocks();
  EXPECT_EQ(ParetoFront(blocks).points(), brute_force(blocks));
}

TEST_P(RandomBlocks, TheChoiceBehindAPointAddsUpToIt) {
  const std::vector<BlockOptions> blocks = draw_blocks();
  const ParetoFront front(blocks);
  for (std::size_t point = 0; point < front.points().size(); ++point) {
    EXPECT_EQ(total(blocks, front.choice(static_cast<std::int64_t>(point))), front.points()[point]);
  }
}

TEST_P(RandomBlocks, CostsRiseAndLossesFall) {
  const ParetoFront front(draw_blocks());
  for (std::size_t i = 1; i < front.points().size(); ++i) {
    EXPECT_LT(front.points()[i - 1].cost, front.points()[i].cost);
    EXPECT_GT(front.points()[i - 1].loss, front.points()[i].loss);
  }
}

TEST_P(RandomBlocks, NoChoiceWithinTheBudgetHasLessLoss) {
  const std::vector<BlockOptions> blocks = draw_blocks();
  const ParetoFront front(blocks);
  const std::int64_t smallest = front.points().front().cost;
  const std::int64_t budget = draw(smallest, smallest + front.points().back().cost);
  const FrontPoint chosen = front.points()[static_cast<std::size_t>(front.within(budget))];
  EXPECT_LE(chosen.cost, budget);
  Choice choice(blocks.size(), 0);
  do {
    const FrontPoint other = total(blocks, choice);
    EXPECT_TRUE(other.cost > budget || other.loss >= chosen.loss);
  } while (advance(blocks, choice));
}

TEST_P(RandomBlocks, AnotherOrderOfTheOptionsGivesTheSameFront) {
  std::vector<BlockOptions> blocks = draw_blocks();
  const std::vector<FrontPoint> points = ParetoFront(blocks).points();
  for (BlockOptions& block : blocks) {
    std::shuffle(block.options.begin(), block.options.end(), generator_);
  }
  EXPECT_EQ(ParetoFront(blocks).points(), points);
}

TEST(ParetoFront, KeepsPointsThatNoLagrangianFinds) {
  // (1, 9) lies above the line between (0, 10) and (2, 0): a concave corner.
  const ParetoFront front({{"a", {{0, 10.0}, {1, 9.0}, {2, 0.0}}}});
  EXPECT_EQ(front.points(), (std::vector<FrontPoint>{{0, 10.0}, {1, 9.0}, {2, 0.0}}));
  EXPECT_EQ(front.within(1), 1);
}

TEST(ParetoFront, GivesABlockWithoutLossItsCheapestWidth) {
  const ParetoFront front(
      {{"flat", {{4, 0.0}, {8, 0.0}, {16, 0.0}}}, {"curved", {{4, 3.0}, {8, 1.0}, {16, 0.0}}}});
  for (std::int64_t point = 0; point < 3; ++point) {
    EXPECT_EQ(front.choice(point), (Choice{0, point}));
  }
}

TEST(ParetoFront, KeepsTheFirstOfEqualOptions) {
  const ParetoFront front({{"a", {{1, 1.0}, {1, 1.0}}}, {"b", {{2, 0.0}, {2, 0.0}}}});
  EXPECT_EQ(front.points(), (std::vector<FrontPoint>{{3, 1.0}}));
  EXPECT_EQ(front.choice(0), (Choice{0, 0}));
}

void expect_error(const std::vector<BlockOptions>& blocks, const std::string& message) {
  const std::string error = error_of([&] { ParetoFront{blocks}; });
  EXPECT_NE(error.find(message), std::string::npos) << error;
}

TEST(ParetoFront, RefusesWhatHasNoMeaning) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  expect_error({}, "there must be at least one block, got none");
  expect_error({{"h.0", {}}}, "'h.0' must have at least one option, got none");
  expect_error({{"h.0", std::vector<WidthOption>(65)}}, "'h.0' must have at most 64 options");
  expect_error({{"h.0", {{-1, 0.0}}}}, "costs of 'h.0' must lie in [0, 2^62], got -1");
  expect_error({{"h.0", {{1, -0.5}}}}, "losses of 'h.0' must be finite and >= 0, got -0.5");
  expect_error({{"h.0", {{1, kInfinity}}}}, "losses of 'h.0' must be finite and >= 0, got inf");
  expect_error({{"h.0", {{1, std::nan("")}}}}, "losses of 'h.0' must be finite and >= 0, got nan");
  const BlockOptions dear{"h.0", {{std::int64_t{1} << 61, 0.0}}};
  expect_error({dear, dear, {"h.2", {{1, 0.0}}}}, "add up to at most 2^62, got more at 'h.2'");
  const BlockOptions bad{"h.0", {{0, 1e308}}};
  expect_error({bad, {"h.1", {{0, 1e308}}}}, "a finite number, got infinity at 'h.1'");
}

TEST(ParetoFront, NamesTheSmallestFeasibleBudget) {
  const ParetoFront front({{"a", {{8, 0.0}, {4, 1.0}}}, {"b", {{3, 0.0}}}});
  EXPECT_EQ(front.within(7), 0);
  EXPECT_EQ(front.within(std::numeric_limits<std::int64_t>::max()), 1);
  EXPECT_EQ(error_of([&] { front.within(6); }),
            "target bits: the budget must be at least 7, the smallest feasible one, got 6");
}

TEST(ParetoFront, RefusesAPointThatItDoesNotHave) {
  const ParetoFront front({{"a", {{8, 0.0}}}});
  EXPECT_THROW(front.choice(-1), Error);
  EXPECT_THROW(front.choice(1), Error);
}

TEST(ParetoFront, StopsAtTheBoundOfItsMemory) {
  // Powers of two: all 2^20 sums differ, and no choice beats another.
  std::vector<BlockOptions> blocks;
  for (int i = 0; i < 20; ++i) {
    const auto power = static_cast<double>(1 << i);
    blocks.push_back({std::to_string(i), {{0, power}, {std::int64_t{1} << i, 0.0}}});
  }
  EXPECT_EQ(ParetoFront(blocks).points().size(), std::size_t{1} << 20);
  EXPECT_THROW(ParetoFront(blocks, 1000), Error);
  EXPECT_THROW(ParetoFront(blocks, 0), Error);
  EXPECT_THROW(ParetoFront(blocks, ParetoFront::kMaxPrefixes + 1), Error);
}

/// A model of 200 blocks at 4, 8 and 16 bits, with traces over four orders of magnitude and squared
/// errors that fall by 2^8 and more a step.
class TwoHundredBlocks : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Costs, TwoHundredBlocks, ::testing::Values("equal", "uneven", "time"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(TwoHundredBlocks, StayFarBelowTheBound) {
  const std::string kind = GetParam();
  std::mt19937_64 generator(5);
  std::vector<BlockOptions> blocks;
  for (int i = 0; i < 200; ++i) {
    // Weights of a block: of one size; multiples of 64 without another pattern; or nanoseconds.
    const auto units = static_cast<std::int64_t>(generator() % 60000 + 20000);
    const std::int64_t size = kind == "equal" ? 14'942'208 : kind == "uneven" ? 64 * units : units;
    const double trace = std::pow(10.0, static_cast<double>(generator() % 4000) / 1000.0 - 2.0);
    BlockOptions& block = blocks.emplace_back();
    block.name = std::to_string(i);
    const auto noise = [&] { return 1.0 + static_cast<double>(generator() % 1000) / 3000.0; };
    double error = 1e-3 * static_cast<double>(size);
    for (const std::int64_t bits : {4, 8, 16}) {
      const auto extra = static_cast<std::int64_t>(generator() % 500);
      const std::int64_t cost = kind == "time" ? bits * size / 4 + extra : bits * size;
      block.options.push_back({.cost = cost, .loss = trace * error * noise()});
      error /= bits == 4 ? 256.0 : 65536.0;
    }
  }
  const auto start = std::chrono::steady_clock::now();
  const ParetoFront front(blocks);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  RecordProperty("points", std::to_string(front.points().size()));
  RecordProperty("prefixes", std::to_string(front.num_prefixes()));
  std::cout << kind << ": " << front.points().size() << " points, " << front.num_prefixes()
            << " prefixes, " << seconds.count() << " s\n";
  EXPECT_LT(front.num_prefixes(), ParetoFront::kMaxPrefixes / 4);
}

}  // namespace
}  // namespace moq::schedule
