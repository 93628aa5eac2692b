// What cuda::linear does in front of and behind its products, alone and as transformers combine it:
// the norm of the input, scales of rows, gates, float32 results, the projection of q, k and v.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/linear.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/linear_cuda_problem.h"
#include "tests/cpp/kernels/written_late.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

/// How a weight is stored. group_size 0: one group a row.
struct Storage {
  WeightFormat format;
  std::int64_t group_size = 0;
  bool asymmetric = false;
};

class LinearCudaRegions
    : public ::testing::TestWithParam<std::tuple<std::int64_t, Storage, DType>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  /// Weights small enough that activations bend.
  LinearProblem problem(std::int64_t n, std::int64_t k) const {
    const auto& [m, storage, dtype] = GetParam();
    const std::int64_t group = storage.group_size;
    const std::int64_t cols = group == 0 ? k : pad_cols(k, group);
    LinearProblem problem =
        LinearProblem::random(m, n, cols, storage.format, group, storage.asymmetric);
    for (float& scale : problem.scales) {
      scale *= 0.05F;
    }
    return problem;
  }
  DType dtype() const { return std::get<DType>(GetParam()); }
  std::int64_t m() const { return std::get<std::int64_t>(GetParam()); }

 private:
  static std::int64_t pad_cols(std::int64_t k, std::int64_t group) {
    return (k + group - 1) / group * group;
  }
};

TEST_P(LinearCudaRegions, ScalesRowsBeforeTheBias) {
  expect_close(multiply(
      problem(37, 101),
      {.dtype = dtype(), .activation = Activation::kGelu, .residual = true, .row_scales = true}));
}

TEST_P(LinearCudaRegions, MultipliesGateAndUpToOneColumn) {
  for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{2, 33}, {74, 200}, {258, 64}}) {
    expect_close(
        multiply(problem(n, k),
                 {.dtype = dtype(), .activation = Activation::kSilu, .padding = 3, .gated = true}));
  }
  expect_close(multiply(problem(30, 96), {.dtype = dtype(),
                                          .activation = Activation::kGeluTanh,
                                          .bias = false,
                                          .row_scales = true,
                                          .gated = true,
                                          .float32_output = true}));
}

TEST_P(LinearCudaRegions, WritesFloat32) {
  for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1, 8}, {51, 203}, {64, 256}}) {
    expect_close(multiply(problem(n, k), {.dtype = dtype(), .padding = 1, .float32_output = true}));
  }
}

TEST_P(LinearCudaRegions, RotatesQueriesAndKeysAndFillsTheCache) {
  for (const auto& [head_dim, rotary_dim, num_heads, num_kv_heads] :
       {std::tuple<int, int, int, int>{64, 64, 3, 1},
        {80, 32, 2, 2},
        {128, 128, 1, 1},
        {128, 0, 2, 1},
        {6, 2, 5, 5},
        {2, 2, 1, 1}}) {
    for (const bool cached : {false, true}) {
      const LinearProblem own =
          problem(static_cast<std::int64_t>(num_heads + 2 * num_kv_heads) * head_dim, 100);
      expect_close(multiply(own, {.dtype = dtype(),
                                  .bias = head_dim != 128,
                                  .padding = cached ? 0 : 2,
                                  .qkv = {.head_dim = head_dim,
                                          .num_heads = num_heads,
                                          .num_kv_heads = num_kv_heads,
                                          .rotary = {.rotary_dim = rotary_dim}},
                                  .cached = cached}));
    }
  }
}

TEST_P(LinearCudaRegions, NormalisesItsInput) {
  if (!cuda::linear_takes_norm(m())) {
    return;
  }
  struct Size {
    std::int64_t n;
    std::int64_t k;
    bool aligned;
  };
  // (Aligned, one token of up to 2048 columns is normalised from registers.)
  for (const auto& [n, k, aligned] :
       {Size{16, 1, false}, Size{19, 31, false}, Size{50, 1600, false}, Size{24, 8, true},
        Size{33, 1600, true}, Size{33, 2048, true}, Size{33, 2056, true}, Size{8, 4099, false},
        Size{18, 8200, true}}) {
    for (const bool rms : {false, true}) {
      LinearProblem own = problem(n, k);
      for (float& x : own.input) {
        x = 0.5F * x + 3.0F;  // a mean beside which the deviations are small
      }
      expect_close(multiply(own, {.dtype = dtype(),
                                  .padding = aligned ? 8 : 3,
                                  .offset = aligned ? 0 : 1,
                                  .weight_is_ready = true,
                                  .norm = rms ? NormKind::kRmsNorm : NormKind::kLayerNorm,
                                  .norm_bias = !rms}));
    }
  }
}

/// Whether weights are streamed here: by compute capability 9.0 that MOQ_GPU_ARCH does not lower.
bool streams() {
  int major = 0;
  MOQ_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  const char* const forced = std::getenv("MOQ_GPU_ARCH");
  return major == 9 && (forced == nullptr || std::atoi(forced) >= 90);
}

TEST_P(LinearCudaRegions, PreferANormOfTheirOwnWhereNothingFasterDoesWithout) {
  const Storage& storage = std::get<Storage>(GetParam());
  if (storage.group_size > 0) {
    return;  // whose size decides
  }
  const WeightFormat own =
      dtype() == DType::kFloat16 ? WeightFormat::kFloat16 : WeightFormat::kBFloat16;
  const bool suits_tensor_cores = dtype() != DType::kFloat32 &&
                                  (storage.format == own || storage.format == WeightFormat::kInt8);
  for (const std::int64_t k : {128, 99}) {  // the latter's rows do not lie on 16 bytes
    const bool others_multiply = suits_tensor_cores && k == 128 && !streams();
    EXPECT_EQ(cuda::linear_prefers_norm({.m = m(),
                                         .input_stride = k + 1,  // of no account: a norm copies
                                         .weight = {.shape = problem(64, k).shape},
                                         .dtype = dtype()}),
              m() <= 8 && !others_multiply)
        << "k " << k;
  }
}

TEST_P(LinearCudaRegions, CombineAsInTransformers) {
  const NormKind norm = cuda::linear_takes_norm(m()) ? NormKind::kRmsNorm : NormKind::kNone;
  expect_close(multiply(
      problem(4 * 64, 128),
      {.dtype = dtype(),
       .norm = norm,
       .qkv = {.head_dim = 64, .num_heads = 2, .num_kv_heads = 1, .rotary = {.rotary_dim = 64}},
       .cached = true}));
  expect_close(
      multiply(problem(320, 128),
               {.dtype = dtype(), .activation = Activation::kSilu, .norm = norm, .gated = true}));
  expect_close(
      multiply(problem(100, 128), {.dtype = dtype(), .norm = norm, .float32_output = true}));
}

std::string name_of(const ::testing::TestParamInfo<LinearCudaRegions::ParamType>& info) {
  const auto& [m, storage, dtype] = info.param;
  return std::string(kernels::name_of(storage.format)) + (storage.group_size > 0 ? "Grouped" : "") +
         (storage.asymmetric ? "Asymmetric" : "") + "By" + std::to_string(m) + moq::name_of(dtype);
}

INSTANTIATE_TEST_SUITE_P(
    Every, LinearCudaRegions,
    ::testing::Combine(
        ::testing::Values<std::int64_t>(1, 2, 7, 8, 9, 16, 17, 33, 64, 65),
        ::testing::Values(Storage{WeightFormat::kInt8}, Storage{WeightFormat::kInt8, 64},
                          Storage{WeightFormat::kInt8, 0, true},
                          Storage{WeightFormat::kInt4, 32, true}, Storage{WeightFormat::kFloat16},
                          Storage{WeightFormat::kBFloat16}, Storage{WeightFormat::kFloat32}),
        ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32)),
    name_of);

/// More rows than thread blocks finish at once, in one block each or in clusters.
class LinearCudaTurns : public ::testing::TestWithParam<std::tuple<std::int64_t, std::int64_t>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearCudaTurns, FinishEveryRow) {
  const auto& [m, k] = GetParam();
  const NormKind norm = cuda::linear_takes_norm(m) ? NormKind::kLayerNorm : NormKind::kNone;
  const std::int64_t n = k > 1000 ? 4480 : 17920;
  LinearProblem problem = LinearProblem::random(m, n, k);
  for (float& scale : problem.scales) {
    scale *= 0.05F;
  }
  expect_close(multiply(problem, {.activation = Activation::kGelu, .residual = true}));
  expect_close(multiply(problem, {.activation = Activation::kSilu, .norm = norm, .gated = true}));
  expect_close(multiply(problem, {.weight_is_ready = true,
                                  .qkv = {.head_dim = 64,
                                          .num_heads = static_cast<std::int32_t>(n / 64 - 20),
                                          .num_kv_heads = 10,
                                          .rotary = {.rotary_dim = 32}},
                                  .cached = true}));
}

INSTANTIATE_TEST_SUITE_P(Every, LinearCudaTurns,
                         ::testing::Combine(::testing::Values<std::int64_t>(1, 2, 3, 8, 12, 16),
                                            ::testing::Values<std::int64_t>(96, 6160, 8200)));

/// Projections of 25 heads of 64: tiles of 128 rows reach from q into k, and from k into v.
class LinearCudaHeads
    : public ::testing::TestWithParam<std::tuple<std::tuple<std::int64_t, std::int64_t>, DType>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_P(LinearCudaHeads, ProjectTwentyFive) {
  const auto& [shape, dtype] = GetParam();
  const auto& [m, k] = shape;
  const NormKind norm = cuda::linear_takes_norm(m) ? NormKind::kLayerNorm : NormKind::kNone;
  for (const auto& [rotary_dim, num_kv_heads] : {std::pair{0, 25}, {64, 25}, {32, 5}}) {
    const LinearProblem problem = LinearProblem::random(m, (25 + 2 * num_kv_heads) * 64, k);
    for (const bool cached : {false, true}) {
      expect_close(multiply(problem, {.dtype = dtype,
                                      .norm = norm,
                                      .norm_bias = norm == NormKind::kLayerNorm,
                                      .qkv = {.head_dim = 64,
                                              .num_heads = 25,
                                              .num_kv_heads = num_kv_heads,
                                              .rotary = {.rotary_dim = rotary_dim}},
                                      .cached = cached}));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Every, LinearCudaHeads,
    ::testing::Combine(::testing::Values(std::tuple{1, 1600}, std::tuple{3, 1600},
                                         std::tuple{9, 200}, std::tuple{33, 136}),
                       ::testing::Values(DType::kFloat16, DType::kBFloat16)));

TEST(LinearCudaNorm, ATokenGivesTheSameBitsAmongUpToEight) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const std::int64_t k : {320, 1600, 2048, 4256, 6160}) {
    const LinearProblem many = LinearProblem::random(8, 75, k);
    LinearProblem one = many;
    one.m = 1;
    const Call call{.norm = NormKind::kLayerNorm, .norm_bias = true};
    const std::vector<float> all = multiply(many, call).output;
    for (std::int64_t i = 0; i < many.m; ++i) {
      one.input.assign(many.input.begin() + i * k, many.input.begin() + (i + 1) * k);
      EXPECT_EQ(multiply(one, call).output,
                std::vector<float>(all.begin() + i * 75, all.begin() + (i + 1) * 75));
    }
  }
}

TEST(LinearCudaNorm, AnOutlierDoesNotSpoilTheVariance) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const std::int64_t k : {320, 1600, 4256, 8200}) {
    for (const std::int64_t place : {std::int64_t{0}, std::int64_t{9}, k / 2, k - 1}) {
      for (const std::int64_t m : {1, 2}) {
        LinearProblem problem = LinearProblem::random(m, 75, k);
        for (std::int64_t i = 0; i < problem.m; ++i) {
          problem.input[i * k + place] = 300.0F;
        }
        expect_close(multiply(problem, {.norm = NormKind::kLayerNorm}));
      }
    }
  }
}

/// Its columns are shared by a cluster.
TEST(LinearCudaNorm, AVeryWideTokenIsTheDefinition) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const Storage& storage :
         {Storage{WeightFormat::kInt8}, Storage{WeightFormat::kInt8, 64, true},
          Storage{dtype == DType::kFloat16 ? WeightFormat::kFloat16 : WeightFormat::kBFloat16}}) {
      for (const NormKind norm : {NormKind::kNone, NormKind::kLayerNorm, NormKind::kRmsNorm}) {
        for (const std::int64_t k : {70016, 70003}) {
          if (k % 64 != 0 && storage.group_size > 0) {
            continue;
          }
          const LinearProblem problem = LinearProblem::random(
              1, 40, k, storage.format, storage.group_size, storage.asymmetric);
          expect_close(multiply(problem, {.dtype = dtype, .weight_is_ready = true, .norm = norm}));
        }
      }
    }
  }
}

/// What lies behind the only row is no row, whatever their distance.
TEST(LinearCudaNorm, ATokenHasAnyStride) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const NormKind norm : {NormKind::kNone, NormKind::kLayerNorm}) {
    expect_close(multiply(LinearProblem::random(1, 40, 1600), {.padding = 3, .norm = norm}));
  }
}

TEST(LinearCudaNorm, WaitsForWhatKernelsAheadWrite) {
  MOQ_SKIP_WITHOUT_GPU();
  for (const std::int64_t m : {1, 2}) {
    for (const std::int64_t k : {320, 1600, 4256, 8200}) {
      const LinearProblem problem = LinearProblem::random(m, 80, k);
      const LinearCudaProblem own(
          problem, {.residual = true, .weight_is_ready = true, .norm = NormKind::kLayerNorm});
      expect_close(own.run([&](const DeviceLinearArgs& args) {
        const WrittenLate input(args.input, args.m * args.input_stride * 2);
        const WrittenLate residual(args.residual, args.m * args.residual_stride * 2);
        input.write();
        residual.write();
        cuda::linear(args, nullptr);
        MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      }));
    }
  }
}

/// What is no number stays in its row.
TEST(LinearCudaNorm, ANanOrAnInfinityFillsItsRowAlone) {
  MOQ_SKIP_WITHOUT_GPU();
  constexpr std::int64_t kN = 75;
  for (const std::int64_t k : {320, 1600, 4256}) {
    for (const float odd :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      for (const NormKind norm : {NormKind::kLayerNorm, NormKind::kRmsNorm}) {
        LinearProblem problem = LinearProblem::random(2, kN, k);
        const std::vector<float> before = multiply(problem, {.norm = norm}).output;
        problem.input[static_cast<std::size_t>(k / 2)] = odd;
        const std::vector<float> both = multiply(problem, {.norm = norm}).output;
        EXPECT_TRUE(std::all_of(both.begin(), both.begin() + kN,
                                [](float value) { return std::isnan(value); }));
        EXPECT_EQ(std::vector<float>(both.begin() + kN, both.begin() + 2 * kN),
                  std::vector<float>(before.begin() + kN, before.begin() + 2 * kN));
        problem.m = 1;
        problem.input.resize(static_cast<std::size_t>(k));
        const std::vector<float> alone = multiply(problem, {.norm = norm}).output;
        EXPECT_TRUE(std::all_of(alone.begin(), alone.begin() + kN,
                                [](float value) { return std::isnan(value); }));
      }
    }
  }
}

TEST(LinearCudaRegionArgs, InconsistentOnesAreNamed) {
  MOQ_SKIP_WITHOUT_GPU();
  const Buffer memory(1 << 14);
  const DeviceLinearArgs good{
      .input = memory.data(),
      .m = 2,
      .input_stride = 8,
      .weight = {.shape = {.n = 12, .k = 8, .group_size = 8}, .data = memory.data()},
      .output = memory.data(),
      .output_stride = 12};
  const auto message = [&](const auto& change) {
    DeviceLinearArgs args = good;
    change(args);
    return error_of([&] { cuda::linear(args, nullptr); });
  };
  using Args = DeviceLinearArgs;
  const auto with_qkv = [&](const auto& change) {
    return message([&](Args& args) {
      args.qkv = {.head_dim = 2, .num_heads = 4, .num_kv_heads = 1};
      change(args);
    });
  };
  const auto* numbers = memory.as<float>();
  EXPECT_EQ(message([](Args& args) { args.norm.kind = NormKind::kRmsNorm; }),
            "linear: norm.weight must not be null");
  EXPECT_EQ(message([&](Args& args) {
              args.norm = {.kind = NormKind::kRmsNorm, .weight = numbers};
              args.m = 9;
            }),
            "linear: m must be <= 8 with a norm, got 9");
  EXPECT_EQ(message([&](Args& args) {
              args.norm = {.kind = NormKind::kRmsNorm, .weight = numbers, .bias = numbers};
            }),
            "linear: norm.bias must be null for an RMS norm");
  EXPECT_EQ(message([](Args& args) {
              args.gated = true;
              args.weight.shape.n = 11;
            }),
            "linear: n must be even when gated, got 11");
  EXPECT_EQ(message([&](Args& args) {
              args.gated = true;
              args.residual = numbers;
            }),
            "linear: residual must be null with gated or float32_output");
  EXPECT_EQ(message([](Args& args) { args.output_stride = 11; }),
            "linear: output_stride must be >= the columns of output, got 11 and 12");
  EXPECT_EQ(message([](Args& args) { args.qkv.head_dim = 3; }),
            "linear: qkv.head_dim must be even and > 0, got 3");
  EXPECT_EQ(with_qkv([](Args& args) { args.qkv.num_heads = 3; }),
            "linear: n must be (qkv.num_heads + 2 * qkv.num_kv_heads) * qkv.head_dim, got 12, 3, 1 "
            "and 2");
  EXPECT_EQ(with_qkv([](Args& args) { args.activation = Activation::kSilu; }),
            "linear: qkv must be without activation, residual, gated and float32_output");
  EXPECT_EQ(with_qkv([](Args& args) { args.qkv.rotary.rotary_dim = 4; }),
            "linear: rotary_dim must be even and in [0, qkv.head_dim], got 4 and 2");
  EXPECT_EQ(with_qkv([](Args& args) { args.qkv.rotary.rotary_dim = 2; }),
            "linear: positions, cos and sin of a rotation must not be null");
  EXPECT_EQ(with_qkv([&](Args& args) { args.qkv.pages.keys = memory.data(); }),
            "linear: qkv.pages.values and qkv.cache_rows must not be null with qkv.pages.keys");
  EXPECT_EQ(with_qkv([&](Args& args) {
              args.qkv.pages = {
                  .keys = memory.data(), .values = memory.data(), .dtype = DType::kInt8};
              args.qkv.cache_rows = memory.as<std::int32_t>();
            }),
            "linear: qkv.pages.dtype must be dtype, got int8 and float16");
  EXPECT_EQ(message([&](Args& args) { args.qkv.pages.keys = memory.data(); }),
            "linear: qkv.pages need a qkv.head_dim");
}

}  // namespace
}  // namespace moq::kernels::testing
