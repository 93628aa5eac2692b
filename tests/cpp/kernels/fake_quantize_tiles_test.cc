// The arithmetic that deals matrices to CUDA thread blocks needs no GPU to be checked.
#include "kernels/cuda/fake_quantize_tiles.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "tests/cpp/kernels/fake_quantize_axes.h"

namespace moq::kernels::cuda {
namespace {

using kernels::testing::Problem;

class FakeQuantizeTiles : public ::testing::TestWithParam<kernels::testing::Axes> {};

TEST_P(FakeQuantizeTiles, EveryElementHasOneThread) {
  const Problem problem(kernels::testing::case_of(GetParam()));
  const FakeQuantizeTensor matrix = problem.tensor(nullptr, nullptr, nullptr, nullptr, nullptr);
  const Tiling tiling = tiling_of(matrix);
  std::vector<int> visits(static_cast<std::size_t>(matrix.rows * matrix.cols), 0);
  for (std::int64_t tile = 0; tile < tiling.tiles; ++tile) {
    for (int thread = 0; thread < kThreads; ++thread) {
      const Place place = place_of(matrix, tiling, tile, thread);
      if (!place.active) {
        continue;
      }
      for (std::int64_t quad = place.begin + kQuad * place.member; quad < place.end;
           quad += std::int64_t{kQuad} * place.members) {
        for (std::int64_t col = quad; col < std::min(quad + kQuad, place.end); ++col) {
          ++visits[static_cast<std::size_t>(place.row * matrix.cols + col)];
        }
      }
    }
  }
  EXPECT_EQ(visits, std::vector<int>(visits.size(), 1));
}

INSTANTIATE_TEST_SUITE_P(
    All, FakeQuantizeTiles,
    ::testing::Combine(
        ::testing::Values(kernels::testing::Shape{1, 1}, kernels::testing::Shape{0, 5},
                          kernels::testing::Shape{3, 0}, kernels::testing::Shape{31, 37},
                          kernels::testing::Shape{65, 2048}, kernels::testing::Shape{3, 9001}),
        kernels::testing::kStorages, kernels::testing::kGranularities,
        ::testing::Values(QuantMode::kSymmetric), ::testing::Values(Rounding::kNearest)),
    kernels::testing::axes_name);

TEST(FakeQuantizeTiles, NeighbouringThreadsFollowTheStorage) {
  const auto tiling = [](kernels::testing::Storage storage, std::int64_t cols) {
    const Problem problem({.rows = 64, .cols = cols, .storage = storage});
    return tiling_of(problem.tensor(nullptr, nullptr, nullptr, nullptr, nullptr));
  };
  for (const auto& [cols, warps] :
       {std::pair(1, 1), std::pair(1024, 1), std::pair(1025, 2), std::pair(2048, 2),
        std::pair(4096, 4), std::pair(8192, 8), std::pair(50257, 8)}) {
    EXPECT_EQ(tiling(kernels::testing::Storage::kLinear, cols).team, Team::kWarps);
    EXPECT_EQ(tiling(kernels::testing::Storage::kLinear, cols).warps, warps) << cols;
  }
  EXPECT_EQ(tiling(kernels::testing::Storage::kConv1d, 4096).team, Team::kLane);
}

TEST(FakeQuantizeTiles, TheLaunchFillsTheDeviceAndNoMore) {
  EXPECT_EQ(fake_quantize_launch(1, 132).blocks, 1U);
  EXPECT_EQ(fake_quantize_launch(1055, 132).blocks, 1055U);
  EXPECT_EQ(fake_quantize_launch(std::int64_t{1} << 40, 132).blocks, 1056U);
  EXPECT_EQ(fake_quantize_launch(1, 132).threads, 256U);
}

}  // namespace
}  // namespace moq::kernels::cuda
