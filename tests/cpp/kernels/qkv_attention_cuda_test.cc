// qkv_attention against the definition of attention in float64, over q, k and v of wgmma_linear,
// which adds up in the same order: to the bit what the kernel keeps in shared memory.
#include "kernels/qkv_attention.h"

#include <gtest/gtest.h>

#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/device.h"

#if defined(MOQ_WITH_CUDA)

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/linear_kernels.h"
#include "tests/cpp/kernels/attention_cuda_problem.h"
#include "tests/cpp/kernels/linear_problem.h"
#include "tests/cpp/kernels/typed_bytes.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

constexpr std::int64_t kHeadDim = 64;

struct QkvSetup {
  std::int64_t num_heads = 3;
  std::int64_t hidden = 192;
  WeightFormat format = WeightFormat::kInt8;
  DType dtype = DType::kFloat16;
  std::vector<std::int32_t> lengths = {128};
  bool asymmetric = false;
  bool causal = false;
  bool alibi = false;
  bool bias = true;
  bool ready = false;
  std::int64_t padding = 0;  ///< elements behind rows of the input
};

/// A projection and attention over it, on the device.
class QkvAttentionProblem {
 public:
  explicit QkvAttentionProblem(const QkvSetup& setup)
      : setup_(setup), n_(3 * setup.num_heads * kHeadDim), batch_(attention_setup(setup)) {
    for (const std::int32_t length : setup_.lengths) {
      m_ += length;
    }
    const LinearProblem problem =
        LinearProblem::random(m_, n_, setup_.hidden, setup_.format, 0, setup_.asymmetric);
    packed_.emplace(Device::kCuda, std::vector<std::byte>(cuda::packed_linear_size(problem.shape)));
    std::vector<float> scales = problem.scales;
    for (float& scale : scales) {
      scale *= 0.1F;  // softmax of larger scores is all or nothing
    }
    const OnDevice<std::byte> weight(Device::kCuda, problem.weight_data());
    const OnDevice<float> device_scales(Device::kCuda, scales);
    const OnDevice<std::int32_t> zero_points(Device::kCuda, problem.zero_points);
    PackLinearArgs pack = problem.pack_args(weight.data());
    pack.scales = device_scales.data();
    pack.zero_points = problem.shape.asymmetric ? zero_points.data() : nullptr;
    pack.packed = packed_->data();
    cuda::pack_linear(pack, nullptr);
    MOQ_CUDA_CHECK(cudaDeviceSynchronize());
    shape_ = problem.shape;
    std::vector<float> input = problem.input;
    const bool is_float = !is_integer(setup_.format);
    for (float& value : input) {
      value *= is_float ? 0.1F : 1.0F;
    }
    input_.emplace(Device::kCuda,
                   to_bytes(spread(input, m_, setup_.hidden, setup_.padding, 0), setup_.dtype));
    bias_.emplace(Device::kCuda, to_bytes(problem.bias, setup_.dtype));
  }

  DeviceLinearArgs projection() const {
    return {.input = input_->data(),
            .m = m_,
            .input_stride = setup_.hidden + setup_.padding,
            .weight = {.shape = shape_, .data = packed_->data()},
            .bias = setup_.bias ? bias_->data() : nullptr,
            .dtype = setup_.dtype,
            .weight_is_ready = setup_.ready};
  }
  /// The query and packed rows are not asked for.
  DeviceAttentionArgs attention() const {
    DeviceAttentionArgs args = batch_.args();
    args.query = args.packed_keys = args.packed_values = nullptr;
    args.query_stride = args.packed_stride = 0;
    args.past_is_ready = setup_.ready;
    return args;
  }

  void expect_exact() {
    const auto launch = [&] { cuda::qkv_attention(projection(), attention(), nullptr); };
    const std::vector<float> output = batch_.compute(launch);
    write_rows();
    batch_.expect_exact(output);
    EXPECT_EQ(batch_.compute(launch), output);
  }

 private:
  static AttentionSetup attention_setup(const QkvSetup& setup) {
    AttentionSetup attention{.heads = {setup.num_heads, setup.num_heads},
                             .head_dim = kHeadDim,
                             .dtype = setup.dtype,
                             .storage = KeyStorage::kPacked,
                             .lengths = {},
                             .causal = setup.causal,
                             .alibi = setup.alibi};
    for (const std::int32_t length : setup.lengths) {
      attention.lengths.push_back({length, 0});
    }
    return attention;
  }

  /// q, k and v of another kernel.
  void write_rows() {
    const DeviceAttentionArgs args = batch_.args();
    DeviceLinearArgs projection = this->projection();
    projection.output = const_cast<void*>(args.query);
    projection.output_stride = args.query_stride;
    const bool halves = cuda::qkv_attention_halves(projection, args);
    const cuda::WgmmaChoice choice{cuda::WgmmaTile::k64x64, halves ? 2 : 1};
    cuda::wgmma_linear(projection, cuda::device_layout(shape_), {choice, n_, choice}, nullptr);
    batch_.take_rows();
  }

  QkvSetup setup_;
  std::int64_t n_;
  std::int64_t m_ = 0;
  LinearShape shape_;
  AttentionBatch batch_;
  std::optional<OnDevice<std::byte>> packed_;
  std::optional<OnDevice<std::byte>> input_;
  std::optional<OnDevice<std::byte>> bias_;
};

bool has_qkv_attention() {
  const QkvAttentionProblem problem({.num_heads = 1, .hidden = 64, .lengths = {64}});
  return cuda::prefers_qkv_attention(problem.projection(), problem.attention());
}

#define MOQ_SKIP_WITHOUT_QKV_ATTENTION()             \
  do {                                               \
    MOQ_SKIP_WITHOUT_GPU();                          \
    if (!has_qkv_attention()) {                      \
      GTEST_SKIP() << "this GPU has no such kernel"; \
    }                                                \
  } while (false)

void expect_exact(const QkvSetup& setup) {
  QkvAttentionProblem(setup).expect_exact();
}

struct Weight {
  WeightFormat format;
  DType dtype;
  bool asymmetric = false;
};

class QkvAttentionCuda
    : public ::testing::TestWithParam<std::tuple<Weight, std::int64_t, std::vector<std::int32_t>>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_QKV_ATTENTION(); }
  QkvSetup setup() const {
    const auto& [weight, hidden, lengths] = GetParam();
    return {.hidden = hidden,
            .format = weight.format,
            .dtype = weight.dtype,
            .lengths = lengths,
            .asymmetric = weight.asymmetric};
  }
};

TEST_P(QkvAttentionCuda, SeesBothDirections) {
  expect_exact(setup());
}

TEST_P(QkvAttentionCuda, SeesThePastByDistance) {
  QkvSetup setup = this->setup();
  setup.causal = setup.alibi = true;
  expect_exact(setup);
}

TEST_P(QkvAttentionCuda, BeginsBeforeTheKernelsAhead) {
  QkvSetup setup = this->setup();
  setup.ready = true;
  setup.bias = false;
  setup.padding = 8;
  expect_exact(setup);
}

// Ends of tiles of tokens (64) and of rows of a warp (16); sequences of none and of one token.
const std::vector<std::vector<std::int32_t>> kLengths = {
    {128}, {64}, {9}, {65}, {127}, {1}, {16, 17, 15}, {0, 128, 1, 64, 63, 0, 100}, {33, 128, 128}};

INSTANTIATE_TEST_SUITE_P(
    Shapes, QkvAttentionCuda,
    ::testing::Combine(::testing::Values(Weight{WeightFormat::kInt8, DType::kFloat16},
                                         Weight{WeightFormat::kInt8, DType::kFloat16, true},
                                         Weight{WeightFormat::kInt8, DType::kBFloat16, true},
                                         Weight{WeightFormat::kInt4, DType::kFloat16},
                                         Weight{WeightFormat::kFloat16, DType::kFloat16},
                                         Weight{WeightFormat::kBFloat16, DType::kBFloat16}),
                       ::testing::Values(192, 1000), ::testing::ValuesIn(kLengths)));

class QkvAttentionCudaTest : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_QKV_ATTENTION(); }
};

/// Columns that are no multiple of a step (64), fewer than a ring has, an odd number of steps for
/// two warpgroups; more clusters than run at once.
TEST_F(QkvAttentionCudaTest, AnyWidthAndNumberOfHeads) {
  for (const auto& [heads, hidden] : {std::pair<std::int64_t, std::int64_t>{1, 8},
                                      {1, 40},
                                      {2, 72},
                                      {1, 576},
                                      {12, 768},
                                      {16, 1024},
                                      {3, 1088},
                                      {70, 64},
                                      {40, 200}}) {
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kFloat16}) {
      expect_exact({.num_heads = heads, .hidden = hidden, .format = format, .lengths = {100, 128}});
      expect_exact({.num_heads = heads, .hidden = hidden, .format = format, .lengths = {50}});
    }
  }
}

TEST_F(QkvAttentionCudaTest, HalvesColumnsWhereThereIsRoom) {
  const auto halves = [](const QkvSetup& setup) {
    const QkvAttentionProblem problem(setup);
    return cuda::qkv_attention_halves(problem.projection(), problem.attention());
  };
  EXPECT_TRUE(halves({.num_heads = 16, .hidden = 1024}));
  EXPECT_FALSE(halves({.num_heads = 16, .hidden = 1024, .lengths = {64}}));
  EXPECT_FALSE(halves({.num_heads = 16, .hidden = 1024, .lengths = {128, 1, 1}}));
  EXPECT_FALSE(halves({.num_heads = 12, .hidden = 768}));
}

TEST_F(QkvAttentionCudaTest, IsPreferredWhereAllHeadsRunAtOnce) {
  const auto prefers = [](const QkvSetup& setup, const auto& change) {
    const QkvAttentionProblem problem(setup);
    DeviceLinearArgs projection = problem.projection();
    DeviceAttentionArgs attention = problem.attention();
    change(projection, attention);
    return cuda::prefers_qkv_attention(projection, attention);
  };
  const auto nothing = [](DeviceLinearArgs&, DeviceAttentionArgs&) {};
  EXPECT_TRUE(prefers({.num_heads = 16}, nothing));
  EXPECT_FALSE(prefers({.num_heads = 16, .lengths = {8}}, nothing));
  EXPECT_FALSE(prefers({.num_heads = 2, .lengths = {129}}, nothing));
  EXPECT_FALSE(prefers({.num_heads = 16, .lengths = std::vector<std::int32_t>(32, 128)}, nothing));
  const auto with = [&](const auto& change) { return prefers({}, change); };
  EXPECT_FALSE(with([](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.num_kv_heads = 1; }));
  EXPECT_FALSE(with([](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.head_dim = 96; }));
  EXPECT_FALSE(
      with([](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.activation = Activation::kGelu; }));
  EXPECT_FALSE(
      with([](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.qkv.rotary.rotary_dim = 64; }));
  EXPECT_FALSE(
      with([](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.norm.kind = NormKind::kLayerNorm; }));
}

TEST_F(QkvAttentionCudaTest, WrongArgumentsAreRefused) {
  const QkvAttentionProblem problem({});
  const auto error = [&](const auto& change) {
    DeviceLinearArgs projection = problem.projection();
    DeviceAttentionArgs attention = problem.attention();
    change(projection, attention);
    return error_of([&] { cuda::qkv_attention(projection, attention, nullptr); });
  };
  EXPECT_NE(error([](DeviceLinearArgs&, DeviceAttentionArgs& a) {
              a.output = nullptr;
            }).find("attention.output must not be null"),
            std::string::npos);
  EXPECT_NE(error([](DeviceLinearArgs& p, DeviceAttentionArgs&) {
              p.input = nullptr;
            }).find("projection.input must not be null"),
            std::string::npos);
  EXPECT_NE(error([](DeviceLinearArgs&, DeviceAttentionArgs& a) {
              a.scale = 0.0F;
            }).find("attention.scale must be > 0, got 0"),
            std::string::npos);
  EXPECT_NE(error([](DeviceLinearArgs&, DeviceAttentionArgs& a) {
              a.num_kv_heads = 1;
            }).find("got 3 heads of 64 dimensions, 1 of keys"),
            std::string::npos);
}

}  // namespace
}  // namespace moq::kernels::testing

#endif
