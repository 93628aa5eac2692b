// Every tile of tile_linear against the definition of linear in float64, with its columns in one
// block and split over a cluster.
#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "kernels/cuda/linear_choice.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/linear.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/linear_cuda_problem.h"
#include "tests/cpp/kernels/linear_tiled_axes.h"

namespace moq::kernels::testing {
namespace {

using cuda::TileSize;

void expect_close_in_every_tile(const LinearProblem& problem, const Call& call) {
  const auto layout = cuda::device_layout(problem.shape);
  const LinearCudaProblem own(problem, call);
  for (const TileSize size : {TileSize::k64x32, TileSize::k64x64, TileSize::k128x32,
                              TileSize::k128x64, TileSize::k128x128}) {
    // Blocks of a multiprocessor for which columns are split: not at all, or as far as they allow.
    for (const int blocks : {0, 8}) {
      SCOPED_TRACE("tile " + std::to_string(static_cast<int>(size)) + ", blocks " +
                   std::to_string(blocks));
      const Outcome outcome = own.run([&](DeviceLinearArgs args) {
        ASSERT_TRUE(cuda::can_tile(args, layout));
        args.weight_is_ready = blocks > 0;
        cuda::tile_linear(args, layout, {cuda::kAny, cuda::kAny, size, blocks}, nullptr);
      });
      expect_close(outcome);
      if (::testing::Test::HasFatalFailure()) {
        return;
      }
    }
  }
}

class LinearTileCuda : public ::testing::TestWithParam<TiledCase> {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearTileCuda, IsTheDefinitionInEveryTile) {
  const auto& [shape, format, dtype, asymmetric] = GetParam();
  expect_close_in_every_tile(
      LinearProblem::random(shape.m, shape.n, shape.k, format, shape.group_size, asymmetric),
      {.dtype = dtype, .padding = 8});
}

/// Tokens and rows around those of tiles, and columns that are split in 1 to 8.
const auto kShapes =
    ::testing::Values(TiledShape{1, 129, 72}, TiledShape{31, 65, 40}, TiledShape{32, 64, 128},
                      TiledShape{33, 201, 776}, TiledShape{64, 127, 264}, TiledShape{65, 37, 2056},
                      TiledShape{127, 63, 8}, TiledShape{128, 1, 1160}, TiledShape{129, 133, 520},
                      TiledShape{130, 257, 136});

const auto kGrouped = ::testing::Values(TiledShape{1, 33, 96, 32}, TiledShape{33, 65, 2080, 32},
                                        TiledShape{65, 129, 576, 64}, TiledShape{64, 31, 1248, 96},
                                        TiledShape{130, 77, 640, 128});
MOQ_INSTANTIATE_TILED(LinearTileCuda, kShapes, kGrouped);

class LinearTileCudaRegions : public ::testing::TestWithParam<std::tuple<DType, std::int64_t>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  /// Weights small enough that activations bend, in five steps of columns.
  static LinearProblem problem(std::int64_t n) {
    LinearProblem problem =
        LinearProblem::random(67, n, 544, WeightFormat::kInt8, std::get<std::int64_t>(GetParam()),
                              /*asymmetric=*/true);
    for (float& scale : problem.scales) {
      scale *= 0.02F;
    }
    return problem;
  }
  static DType dtype() { return std::get<DType>(GetParam()); }
};

TEST_P(LinearTileCudaRegions, AddTheResidualToEveryActivation) {
  for (const Activation activation :
       {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
        Activation::kQuickGelu, Activation::kSilu, Activation::kTanh}) {
    expect_close_in_every_tile(problem(77), {.dtype = dtype(),
                                             .activation = activation,
                                             .bias = activation != Activation::kRelu,
                                             .residual = true,
                                             .padding = 8,
                                             .row_scales = true});
  }
}

TEST_P(LinearTileCudaRegions, MultiplyGateAndUp) {
  for (const std::int64_t n : {74, 152}) {
    expect_close_in_every_tile(
        problem(n),
        {.dtype = dtype(), .activation = Activation::kSilu, .padding = 8, .gated = true});
  }
}

TEST_P(LinearTileCudaRegions, WriteFloat32) {
  expect_close_in_every_tile(problem(101), {.dtype = dtype(), .float32_output = true});
}

TEST_P(LinearTileCudaRegions, RotateQueriesAndKeysAndFillTheCache) {
  for (const auto& [head_dim, rotary_dim, num_heads, num_kv_heads] :
       {std::tuple<int, int, int, int>{64, 64, 3, 1}, {80, 32, 1, 1}, {6, 2, 5, 5}}) {
    for (const bool cached : {false, true}) {
      expect_close_in_every_tile(
          problem(static_cast<std::int64_t>(num_heads + 2 * num_kv_heads) * head_dim),
          {.dtype = dtype(),
           .qkv = {.head_dim = head_dim,
                   .num_heads = num_heads,
                   .num_kv_heads = num_kv_heads,
                   .rotary = {.rotary_dim = rotary_dim}},
           .cached = cached});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Every, LinearTileCudaRegions,
                         ::testing::Combine(kHalfDTypes, ::testing::Values<std::int64_t>(0, 32)));

}  // namespace
}  // namespace moq::kernels::testing
