// How the streaming kernel of cuda::linear shares a weight: everything has its place, without a
// GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/cuda/linear_choice.h"
#include "kernels/cuda/linear_stream_plan.h"

namespace moq::kernels::cuda {
namespace {

struct Weight {
  std::int64_t n;
  std::int64_t k;
  WeightFormat format = WeightFormat::kInt8;
  std::int64_t group_size = 0;
  bool asymmetric = false;
};

/// A weight, how many blocks run at once, and whether each leaves room for another.
class StreamPlanTest : public ::testing::TestWithParam<std::tuple<Weight, std::int64_t, bool>> {
 protected:
  DeviceLayout layout() const {
    const Weight& weight = std::get<Weight>(GetParam());
    return device_layout({.n = weight.n,
                          .k = weight.k,
                          .format = weight.format,
                          .group_size = weight.group_size > 0 ? weight.group_size : weight.k,
                          .asymmetric = weight.asymmetric});
  }
  StreamPlan plan(int m) const {
    return stream_plan(layout(), m, std::get<std::int64_t>(GetParam()) / stream_split(layout(), m),
                       std::get<bool>(GetParam()));
  }
};

TEST_P(StreamPlanTest, SharesAllRowsAndResults) {
  for (int m = 1; m <= kStreamTokens; ++m) {
    const StreamPlan plan = this->plan(m);
    EXPECT_EQ(static_cast<std::int64_t>(plan.clusters) * plan.cluster_rows + plan.row_extra,
              layout().row_blocks);
    EXPECT_LT(plan.row_extra, plan.clusters);
    EXPECT_LE(plan.split, kMaxSplit);
    EXPECT_EQ(plan.turn_rows * kBlockRows, 1 << plan.turn_bits);
    EXPECT_EQ(plan.turn_rows * kBlockRows / plan.split, 1 << plan.share_bits);
    EXPECT_GE(plan.share_bits, 1) << "a block finishes pairs of rows";
    EXPECT_LE(plan.turn_results, kStreamWarps * 32);
  }
}

TEST_P(StreamPlanTest, KeepsRingsWithinSharedMemory) {
  const DeviceLayout layout = this->layout();
  for (int m = 1; m <= kStreamTokens; ++m) {
    const StreamPlan plan = this->plan(m);
    EXPECT_LE(plan.shared_bytes, kMaxSharedBytes);
    EXPECT_GE(plan.stages[0], 1);
    EXPECT_LE(plan.stages[0], plan.stages[1]);
    EXPECT_LE(plan.stages[1], kMaxStages);
    EXPECT_GE(plan.early, 1);
    for (int rank = 0; rank < plan.split; ++rank) {
      int bytes = 0;
      for (int part = rank * kStreamWarps; part < (rank + 1) * kStreamWarps; ++part) {
        const int blocks =
            part_begin(layout, plan.part_bits, part + 1) - part_begin(layout, plan.part_bits, part);
        ASSERT_TRUE(blocks == plan.part_blocks || blocks == plan.part_blocks + 1);
        bytes += plan.stages[1] * plan.stage_bytes[blocks - plan.part_blocks];
      }
      EXPECT_LE(bytes, plan.ring_bytes);
    }
    for (int longer = 0; longer < 2; ++longer) {
      EXPECT_GE(plan.piece[longer], 1);
      EXPECT_GE(plan.stage_bytes[longer], plan.piece[longer] * kBlockBytes + 2 * plan.grid_bytes);
    }
    if (layout.groups > 1) {
      const std::int64_t group_blocks = layout.group_size / layout.block_cols;
      for (std::int64_t first = 0; first + plan.piece[1] <= layout.col_blocks; ++first) {
        const std::int64_t last = first + plan.piece[1] - 1;
        EXPECT_LE((last / group_blocks - first / group_blocks + 1) * kGridBytes, plan.grid_bytes);
      }
    }
  }
}

TEST_P(StreamPlanTest, AddsUpAlikeForSeveralTokensAndForOneUnlessTheInputIsWide) {
  const StreamPlan two = plan(2);
  for (int m = two.split == 1 ? 1 : 2; m <= kStreamTokens; ++m) {
    EXPECT_EQ(plan(m).split, two.split);
    EXPECT_EQ(plan(m).part_bits, two.part_bits);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, StreamPlanTest,
    ::testing::Combine(::testing::Values(Weight{1, 1}, Weight{16, 32}, Weight{4800, 1600},
                                         Weight{1600, 6400}, Weight{4256, 17024},
                                         Weight{49152, 12288}, Weight{128256, 4096},
                                         Weight{75, 65000},
                                         Weight{4096, 14336, WeightFormat::kFloat16},
                                         Weight{300, 52224, WeightFormat::kBFloat16},
                                         Weight{40, 384, WeightFormat::kInt4, 32},
                                         Weight{4096, 4096, WeightFormat::kInt4, 128, true},
                                         Weight{4096, 14336, WeightFormat::kInt8, 0, true},
                                         Weight{8192, 28672, WeightFormat::kInt2, 64, true}),
                       ::testing::Values<std::int64_t>(8, 78, 132), ::testing::Bool()));

TEST(StreamPlan, KeepsMoreUnderWayInTheFewClustersThatHaveMoreRows) {
  const auto plan_of = [](std::int64_t n, std::int64_t k) {
    return stream_plan(device_layout({.n = n, .k = k, .format = WeightFormat::kFloat16}), 1, 132);
  };
  const StreamPlan few = plan_of(4256, 17024);  // 2 of 132 have 3 blocks of rows, not 2
  EXPECT_EQ(few.stages[0] * 3, few.stages[1] * 2);
  const StreamPlan many = plan_of(4096, 14336);  // 124 have 2, not 1
  EXPECT_EQ(many.stages[0], many.stages[1]);
  const StreamPlan none = plan_of(4224, 17024);
  EXPECT_EQ(none.stages[0], none.stages[1]);
}

TEST(StreamPlan, BringsMoreAheadInClustersThatHaveMoreRows) {
  // 4 of 132 have 4 blocks of rows, not 3; a ring holds 2.
  const StreamPlan plan =
      stream_plan(device_layout({.n = 6400, .k = 1600, .format = WeightFormat::kFloat16}), 1, 132);
  EXPECT_GT(plan.ahead_blocks[0], 0);
  EXPECT_GE(plan.ahead_blocks[1], plan.part_blocks * 2);
  const StreamPlan held =
      stream_plan(device_layout({.n = 1600, .k = 1600, .format = WeightFormat::kFloat16}), 1, 132);
  EXPECT_EQ(held.ahead_blocks[1], 0);
}

TEST(StreamPlan, LeavesRoomForAnotherBlockOrFillsItWithItsRings) {
  const DeviceLayout layout =
      device_layout({.n = 4256, .k = 4256, .format = WeightFormat::kFloat16});
  const StreamPlan beside = stream_plan(layout, 1, 132, true);
  EXPECT_LE(beside.shared_bytes, kSharingBytes);
  const StreamPlan whole = stream_plan(layout, 1, 132, false);
  EXPECT_GT(whole.ring_bytes, beside.ring_bytes * 3 / 2);
}

TEST(StreamPlan, OnlyLargeProductsWithoutANormOutsideOfChainsLeaveNoRoom) {
  const auto of = [](std::int64_t n, bool in_chain, NormKind norm) {
    const DeviceLayout layout =
        device_layout({.n = n, .k = 4000, .format = WeightFormat::kFloat16});
    return leaves_room({.norm = {.kind = norm}, .in_chain = in_chain}, layout);
  };
  EXPECT_FALSE(of(4000, false, NormKind::kNone));
  EXPECT_TRUE(of(3999, false, NormKind::kNone));
  EXPECT_TRUE(of(4000, true, NormKind::kNone));
  EXPECT_TRUE(of(4000, false, NormKind::kRmsNorm));
}

TEST(StreamPlan, ChoosesPiecesThatFillTheRoom) {
  // Parts of 12 and 13 blocks: there is room for four stages of 6 and 7, but for three of 6 and 8.
  const StreamPlan plan =
      stream_plan(device_layout({.n = 6400, .k = 1600, .format = WeightFormat::kFloat16}), 1, 132);
  EXPECT_EQ(plan.piece[0], 6);
  EXPECT_EQ(plan.piece[1], 7);
  EXPECT_EQ(plan.stages[1], 4);
}

TEST(StreamSplit, IsMoreThanAClusterForInputsThatFitNowhere) {
  const auto split = [](std::int64_t k, int m) {
    return stream_split(device_layout({.n = 16, .k = k, .group_size = k}), m);
  };
  EXPECT_EQ(split(1600, 8), 1);
  EXPECT_EQ(split(12288, 1), 1);
  EXPECT_EQ(split(12288, 2), 2);
  EXPECT_EQ(split(12288, 8), 2);
  EXPECT_EQ(split(70000, 1), 2);
  EXPECT_GT(split(70000, 8), kMaxSplit);
}

}  // namespace
}  // namespace moq::kernels::cuda
