// How the rows of a decode step's projections are dealt to thread blocks, without a GPU.
#include <gtest/gtest.h>

#include "kernels/cuda/decode_step_plan.h"

namespace moq::kernels::cuda::step {
namespace {

/// Every size of decoder on GPUs of several sizes.
template <typename Check>
void for_each_plan(const Check& check) {
  for (const std::int64_t multiprocessors : {2, 5, 78, 108, 114, 126, 132, 133, 148, 1000}) {
    for (std::int64_t heads = 1; heads <= kMaxHeads; ++heads) {
      if (const int grid = grid_of(heads, multiprocessors); grid > 0) {
        check(heads, multiprocessors, grid, units_of(heads, grid));
      }
    }
  }
}

TEST(DecodeStepPlanTest, DealsAllRowsOnceInOrder) {
  constexpr std::int64_t kUnits[kProjections] = {12, 4, 16, 4};  // of a head
  for_each_plan([&](std::int64_t heads, std::int64_t, int grid, const Units& units) {
    ASSERT_EQ(units.size(), static_cast<std::size_t>(kProjections * (grid + 1)));
    for (int projection = 0; projection < kProjections; ++projection) {
      const auto* const first = units.data() + projection * (grid + 1);
      EXPECT_EQ(first[0], 0);
      EXPECT_EQ(first[grid], heads * kUnits[projection]);
      for (int block = 0; block < grid; ++block) {
        const int count = first[block + 1] - first[block];
        EXPECT_GE(count, projection == kUp ? 1 : 0) << heads << " heads, block " << block;
        EXPECT_LE(count, projection == kOut || projection == kDown ? 1 : kMaxUnits);
      }
    }
  });
}

TEST(DecodeStepPlanTest, TheSameBlocksHaveTheResidualStreamAndTheLastIsOne) {
  for_each_plan([](std::int64_t, std::int64_t, int grid, const Units& units) {
    for (int block = 0; block <= grid; ++block) {
      EXPECT_EQ(units[kOut * (grid + 1) + block], units[kDown * (grid + 1) + block]);
    }
    EXPECT_GT(units[kDown * (grid + 1) + grid], units[kDown * (grid + 1) + grid - 1]);
  });
}

TEST(DecodeStepPlanTest, HasBlocksForAllPartsOfAllHeadsAndNoMoreThanMultiprocessors) {
  for_each_plan([](std::int64_t heads, std::int64_t multiprocessors, int grid, const Units&) {
    EXPECT_LE(grid, multiprocessors);
    EXPECT_GE(grid, heads * kSplits);
  });
  EXPECT_EQ(grid_of(25, 132), 132);
  EXPECT_EQ(grid_of(25, 124), 0);
  EXPECT_EQ(grid_of(1, 132), 16);
  EXPECT_EQ(grid_of(1, 4), 0);
}

}  // namespace
}  // namespace moq::kernels::cuda::step
