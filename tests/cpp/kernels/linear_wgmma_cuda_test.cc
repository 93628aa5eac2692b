// Every tile of wgmma_linear against the definition of linear in float64, in every region of a
// transformer that it computes.
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/linear_choice.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/linear.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/linear_cuda_problem.h"
#include "tests/cpp/kernels/linear_tiled_axes.h"
#include "tests/cpp/kernels/written_late.h"

namespace moq::kernels::testing {
namespace {

/// Multiplies by a tile where wgmma_linear takes the problem, and skips the test otherwise.
void expect_close_in(const LinearCudaProblem& problem, const cuda::DeviceLayout& layout,
                     const cuda::WgmmaPlan& plan, bool ready) {
  SCOPED_TRACE("tile " + std::to_string(static_cast<int>(plan.first.tile)) + ", split " +
               std::to_string(plan.first.split));
  bool taken = false;
  const Outcome outcome = problem.run([&](DeviceLinearArgs args) {
    args.weight_is_ready = ready;
    if (ready) {
      args.next_weight = args.weight.data;  // of which nothing but time depends
      args.next_bytes = layout.bytes / 16 * 16;
    }
    taken = cuda::can_wgmma(args, layout);
    if (taken) {
      cuda::wgmma_linear(args, layout, plan, nullptr);
    }
  });
  if (!taken) {
    GTEST_SKIP() << "wgmma_linear does not take these, or not on this GPU";
  }
  expect_close(outcome);
}

void expect_close_in_every_tile(const LinearProblem& problem, const Call& call) {
  const auto layout = cuda::device_layout(problem.shape);
  const LinearCudaProblem own(problem, call);
  for (const cuda::WgmmaCost& cost : cuda::kWgmmaCosts) {
    if (cost.groups != (layout.groups > 1)) {
      continue;
    }
    for (const bool ready : {false, true}) {
      // All rows by one launch, or the last by another.
      expect_close_in(own, layout, {cost.choice, ready ? cost.rows : layout.n, cost.choice}, ready);
      if (::testing::Test::IsSkipped() || ::testing::Test::HasFatalFailure()) {
        return;
      }
    }
  }
}

class LinearWgmmaCuda : public ::testing::TestWithParam<TiledCase> {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearWgmmaCuda, IsTheDefinitionInEveryTile) {
  const auto& [shape, format, dtype, asymmetric] = GetParam();
  expect_close_in_every_tile(
      LinearProblem::random(shape.m, shape.n, shape.k, format, shape.group_size, asymmetric),
      {.dtype = dtype, .padding = shape.k % 8 == 0 ? 8 : 16 - shape.k % 8});
}

const auto kShapes =
    ::testing::Values(TiledShape{65, 24, 40}, TiledShape{127, 200, 72}, TiledShape{128, 264, 520},
                      TiledShape{129, 136, 776}, TiledShape{255, 88, 200}, TiledShape{300, 77, 91},
                      TiledShape{13, 150, 968}, TiledShape{5, 88, 200});

const auto kGrouped = ::testing::Values(TiledShape{65, 24, 96, 32}, TiledShape{130, 200, 576, 64},
                                        TiledShape{257, 136, 640, 128},
                                        TiledShape{128, 88, 480, 96}, TiledShape{13, 150, 960, 32});
MOQ_INSTANTIATE_TILED(LinearWgmmaCuda, kShapes, kGrouped);
// More tiles than a GPU has multiprocessors: blocks take several.
INSTANTIATE_TEST_SUITE_P(Huge, LinearWgmmaCuda,
                         ::testing::Combine(::testing::Values(TiledShape{1000, 4600, 16}),
                                            ::testing::Values(WeightFormat::kInt8),
                                            ::testing::Values(DType::kFloat16),
                                            ::testing::Values(false)));

class LinearWgmmaCudaParts : public ::testing::TestWithParam<int> {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearWgmmaCudaParts, OfTheColumnsAreAnyNumberForFewTokens) {
  for (const std::int64_t group_size : {std::int64_t{0}, std::int64_t{64}}) {
    for (const std::int64_t k : {std::int64_t{448}, std::int64_t{2112}}) {
      const LinearProblem problem =
          LinearProblem::random(11, 150, k, WeightFormat::kInt8, group_size, group_size > 0);
      const cuda::WgmmaChoice choice{cuda::WgmmaTile::k64x16, GetParam()};
      expect_close_in(LinearCudaProblem(problem, {.residual = true, .padding = 8}),
                      cuda::device_layout(problem.shape), {choice, 150, choice}, true);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Every, LinearWgmmaCudaParts, ::testing::Range(1, 9));

TEST(LinearWgmmaCudaChoice, IsTheTileOfSixteenTokensForNoMore) {
  MOQ_SKIP_WITHOUT_GPU();
  const Buffer memory(4096);  // whose address is asked for, nothing more
  for (const std::int64_t group_size : {std::int64_t{14336}, std::int64_t{128}}) {
    DeviceLinearArgs args{
        .input = memory.data(),
        .m = 16,
        .input_stride = 14336,
        .weight = {.shape = {.n = 4096, .k = 14336, .group_size = group_size}},
    };
    const auto layout = cuda::device_layout(args.weight.shape);
    if (!cuda::can_wgmma(args, layout)) {
      GTEST_SKIP() << "not on this GPU";
    }
    EXPECT_EQ(cuda::choose_wgmma(args, layout).first.tile, cuda::WgmmaTile::k64x16);
    args.m = 17;
    EXPECT_NE(cuda::choose_wgmma(args, layout).first.tile, cuda::WgmmaTile::k64x16);
  }
}

class LinearWgmmaCudaRegions : public ::testing::TestWithParam<std::tuple<DType, std::int64_t>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  /// Weights small enough that activations bend.
  static LinearProblem problem(std::int64_t m, std::int64_t n, std::int64_t k) {
    const std::int64_t group_size = std::get<std::int64_t>(GetParam());
    LinearProblem problem =
        LinearProblem::random(m, n, k, WeightFormat::kInt8, group_size, /*asymmetric=*/true);
    for (float& scale : problem.scales) {
      scale *= 0.05F;
    }
    return problem;
  }
  static DType dtype() { return std::get<DType>(GetParam()); }
};

TEST_P(LinearWgmmaCudaRegions, AddTheResidualToEveryActivation) {
  for (const Activation activation :
       {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
        Activation::kQuickGelu, Activation::kSilu, Activation::kTanh}) {
    expect_close_in_every_tile(problem(131, 148, 96), {.dtype = dtype(),
                                                       .activation = activation,
                                                       .bias = activation != Activation::kRelu,
                                                       .residual = true,
                                                       .padding = 8,
                                                       .row_scales = true});
  }
}

TEST_P(LinearWgmmaCudaRegions, MultiplyGateAndUp) {
  for (const std::int64_t n : {152, 90}) {
    expect_close_in_every_tile(
        problem(131, n, 96),
        {.dtype = dtype(), .activation = Activation::kSilu, .padding = 8, .gated = true});
  }
}

TEST_P(LinearWgmmaCudaRegions, WriteFloat32) {
  // Rows that begin at any float, or each 16 bytes on, with and without a rest of n.
  for (const auto& [n, padding] : {std::pair<int, int>{101, 0}, {104, 0}, {104, 1}, {79, 1}}) {
    expect_close_in_every_tile(problem(66, n, 96), {.dtype = dtype(),
                                                    .activation = Activation::kGelu,
                                                    .output_padding = padding,
                                                    .row_scales = true,
                                                    .float32_output = true});
  }
}

TEST_P(LinearWgmmaCudaRegions, RotateQueriesAndKeysAndFillTheCache) {
  for (const auto& [head_dim, rotary_dim, num_heads, num_kv_heads] :
       {std::tuple<int, int, int, int>{64, 64, 3, 1},
        {80, 32, 2, 2},
        {128, 0, 2, 1},
        {24, 0, 3, 2},  // heads of q, k and v that share the rows of a warpgroup
        {72, 0, 2, 1},
        {12, 0, 2, 2},  // 16 bytes of a row belong to two heads
        {6, 2, 5, 5}}) {
    for (const bool cached : {false, true}) {
      // Rows of the cache are distinct up to 192 tokens.
      expect_close_in_every_tile(
          problem(131, static_cast<std::int64_t>(num_heads + 2 * num_kv_heads) * head_dim, 96),
          {.dtype = dtype(),
           .qkv = {.head_dim = head_dim,
                   .num_heads = num_heads,
                   .num_kv_heads = num_kv_heads,
                   .rotary = {.rotary_dim = rotary_dim}},
           .cached = cached});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Every, LinearWgmmaCudaRegions,
                         ::testing::Combine(kHalfDTypes, ::testing::Values<std::int64_t>(0, 32)));

// ---- behind a kernel that lets it begin early

class LinearWgmmaCudaChain
    : public ::testing::TestWithParam<std::tuple<WeightFormat, std::int64_t>> {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearWgmmaCudaChain, WaitsForWhatKernelsAheadWrite) {
  const auto& [format, group_size] = GetParam();  // of 0 columns: whole rows
  const LinearProblem problem =
      LinearProblem::random(128, 264, group_size > 0 ? 512 : 520, format, group_size);
  const auto layout = cuda::device_layout(problem.shape);
  const LinearCudaProblem own(problem, {.residual = true, .padding = 8, .weight_is_ready = true});
  for (const cuda::WgmmaCost& cost : cuda::kWgmmaCosts) {
    if (cost.groups != (group_size > 0)) {
      continue;
    }
    SCOPED_TRACE("tile " + std::to_string(static_cast<int>(cost.choice.tile)) + ", split " +
                 std::to_string(cost.choice.split));
    bool taken = false;
    const Outcome outcome = own.run([&](const DeviceLinearArgs& args) {
      taken = cuda::can_wgmma(args, layout);
      if (taken) {
        const WrittenLate input(args.input, args.m * args.input_stride * 2);
        const WrittenLate residual(args.residual, args.m * args.residual_stride * 2);
        input.write();
        residual.write();
        cuda::wgmma_linear(args, layout, {cost.choice, layout.n, cost.choice}, nullptr);
        MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      }
    });
    if (!taken) {
      GTEST_SKIP() << "wgmma_linear does not take these, or not on this GPU";
    }
    expect_close(outcome);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, LinearWgmmaCudaChain,
                         ::testing::Values(std::tuple{WeightFormat::kInt8, 0},
                                           std::tuple{WeightFormat::kInt8, 64},
                                           std::tuple{WeightFormat::kFloat16, 0}));

// ---- two launches for a weight

class LinearWgmmaPlan : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  static std::int64_t group_size() { return GetParam(); }
  /// Calls visit(cost) with those of tiles for such a weight.
  template <typename Visit>
  static void each_cost(const Visit& visit) {
    for (const cuda::WgmmaCost& cost : cuda::kWgmmaCosts) {
      if (cost.groups == (group_size() > 0)) {
        visit(cost);
      }
    }
  }
};

/// The rest may begin where no tile of its own kind would.
TEST_P(LinearWgmmaPlan, AnyTilesMayFollowAnyOthers) {
  const LinearProblem problem =
      LinearProblem::random(131, 472, 96, WeightFormat::kInt8, group_size(), /*asymmetric=*/true);
  const auto layout = cuda::device_layout(problem.shape);
  const LinearCudaProblem own(problem, {.padding = 8});
  bool taken = true;
  each_cost([&](const cuda::WgmmaCost& first) {
    each_cost([&](const cuda::WgmmaCost& rest) {
      if (!taken || HasFatalFailure()) {
        return;
      }
      SCOPED_TRACE("tile " + std::to_string(static_cast<int>(rest.choice.tile)) + ", split " +
                   std::to_string(rest.choice.split) + " behind tile " +
                   std::to_string(static_cast<int>(first.choice.tile)));
      const cuda::WgmmaPlan plan{first.choice, layout.n / first.rows * first.rows, rest.choice};
      const Outcome outcome = own.run([&](const DeviceLinearArgs& args) {
        taken = cuda::can_wgmma(args, layout);
        if (taken) {
          cuda::wgmma_linear(args, layout, plan, nullptr);
        }
      });
      if (taken) {
        expect_close(outcome);
      }
    });
  });
  if (!taken) {
    GTEST_SKIP() << "wgmma_linear does not take these, or not on this GPU";
  }
}

TEST_P(LinearWgmmaPlan, TheFirstLaunchTakesWholeTilesAndLeavesSomething) {
  int plans_of_two = 0;
  for (const std::int64_t m : {9, 33, 64, 200, 384, 512, 1000, 2048, 4096}) {
    for (const std::int64_t n : {1, 63, 768, 1600, 3077, 4800, 6400, 11008, 12288, 17096}) {
      for (const std::int64_t k : {32, 768, 1600, 4096, 6400}) {
        SCOPED_TRACE(std::to_string(m) + " tokens, " + std::to_string(n) + " x " +
                     std::to_string(k));
        const auto layout =
            cuda::device_layout({.n = n,
                                 .k = k,
                                 .format = WeightFormat::kInt8,
                                 .group_size = group_size() > 0 && k > 32 ? group_size() : k});
        const bool groups = layout.groups > 1;
        const cuda::WgmmaPlan plan = cuda::choose_wgmma({.m = m}, layout);
        if (plan.rows >= n) {
          continue;
        }
        ++plans_of_two;
        EXPECT_GT(plan.rows, 0);
        std::int64_t tile_rows = 0;
        for (const cuda::WgmmaCost& cost : cuda::kWgmmaCosts) {
          if (cost.groups == groups && cost.choice.tile == plan.first.tile) {
            tile_rows = cost.rows;
          }
        }
        ASSERT_GT(tile_rows, 0);
        EXPECT_EQ(plan.rows % tile_rows, 0);
      }
    }
  }
  EXPECT_GT(plans_of_two, 0);
}

INSTANTIATE_TEST_SUITE_P(Groups, LinearWgmmaPlan, ::testing::Values<std::int64_t>(0, 32));

}  // namespace
}  // namespace moq::kernels::testing
