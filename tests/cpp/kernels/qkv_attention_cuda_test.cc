// qkv_attention against the definition of attention in float64, over q, k and v of wgmma_linear,
// which adds up in the same order: to the bit what the kernel keeps in shared memory.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/qkv_attention.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/attention_cuda_problem.h"
#include "tests/cpp/kernels/device.h"
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
    values_ = problem.input;
    for (float& value : values_) {
      value *= is_integer(setup_.format) ? 1.0F : 0.1F;
    }
    set_input(values_);
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
  /// Of all tokens, one after the other.
  const std::vector<float>& input() const { return values_; }
  void set_input(const std::vector<float>& values) {
    input_.emplace(Device::kCuda,
                   to_bytes(spread(values, m_, setup_.hidden, setup_.padding, 0), setup_.dtype));
  }
  const std::vector<DeviceSequence>& sequences() { return batch_.sequences(); }

  /// The query and packed rows are not asked for.
  DeviceAttentionArgs attention() const {
    DeviceAttentionArgs args = batch_.args();
    args.query = args.packed_keys = args.packed_values = nullptr;
    args.query_stride = args.packed_stride = 0;
    args.past_is_ready = setup_.ready;
    return args;
  }

  std::vector<float> compute() const {
    return batch_.compute([&] { cuda::qkv_attention(projection(), attention(), nullptr); });
  }
  void expect_exact() {
    const std::vector<float> output = compute();
    write_rows();
    batch_.expect_exact(output);
    EXPECT_EQ(compute(), output);
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
  std::vector<float> values_;
  std::optional<OnDevice<std::byte>> packed_;
  std::optional<OnDevice<std::byte>> input_;
  std::optional<OnDevice<std::byte>> bias_;
};

bool has_qkv_attention() {
  const QkvAttentionProblem problem({.num_heads = 1, .hidden = 64, .lengths = {64}});
  const DeviceLinearArgs projection = problem.projection();
  return cuda::can_wgmma(projection, cuda::device_layout(projection.weight.shape));
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

TEST_P(QkvAttentionCuda, ReadsItsOwnWeightEarly) {
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

/// What the next sequence's tokens are must not matter, though a tile has them too: for the keys
/// and values that stand behind a sequence, and the references of a warp's softmax.
TEST_F(QkvAttentionCudaTest, NeighboursDoNotMatter) {
  for (const std::int64_t hidden : {192, 1000}) {
    const QkvSetup setup{.hidden = hidden, .lengths = {70, 58}};
    QkvAttentionProblem problem(setup);
    const std::int32_t first = problem.sequences()[0].token_begin;
    const auto own = [&](const std::vector<float>& output) {
      const auto stride = static_cast<std::int64_t>(output.size()) / 128;
      return std::vector<float>(output.begin() + first * stride,
                                output.begin() + (first + 70) * stride);
    };
    const std::vector<float> expected = own(problem.compute());
    for (const float factor : {100.0F, std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> input = problem.input();
      const std::int64_t other = problem.sequences()[1].token_begin;
      for (std::int64_t i = other * hidden; i < (other + 58) * hidden; ++i) {
        input[static_cast<std::size_t>(i)] *= factor;
      }
      problem.set_input(input);
      EXPECT_EQ(own(problem.compute()), expected) << "hidden " << hidden << ", times " << factor;
    }
  }
}

/// A kernel that still writes the input when this one begins, and one behind it that reads what it
/// writes: as if each had waited for the one before to end.
TEST_F(QkvAttentionCudaTest, WaitsForWhatItReads) {
  constexpr std::int64_t kDepth = 8192;  // columns that take time
  constexpr std::int64_t kTokens = 128;
  for (const std::int64_t hidden : {192, 1152}) {
    const QkvAttentionProblem before(
        {.num_heads = hidden / (3 * kHeadDim), .hidden = kDepth, .ready = true});
    const QkvAttentionProblem problem({.hidden = hidden, .ready = true});
    const std::int64_t width = problem.attention().num_heads * kHeadDim;
    const QkvAttentionProblem behind({.num_heads = 1, .hidden = width, .ready = true});
    const auto memory = [&](std::int64_t cols) {
      return std::vector<std::byte>(static_cast<std::size_t>(kTokens * cols * 2), std::byte{0xFF});
    };
    const OnDevice<std::byte> input(Device::kCuda, memory(hidden));
    const OnDevice<std::byte> attended(Device::kCuda, memory(width));
    const OnDevice<std::byte> output(Device::kCuda, memory(3 * kHeadDim));
    const auto run = [&](bool synchronizes) {
      const auto next = [&] {
        if (synchronizes) {
          MOQ_CUDA_CHECK(cudaDeviceSynchronize());
        }
      };
      MOQ_CUDA_CHECK(cudaMemset(input.data(), 0xFF, kTokens * hidden * 2));  // NaN
      MOQ_CUDA_CHECK(cudaMemset(attended.data(), 0xFF, kTokens * width * 2));
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      DeviceLinearArgs writes = before.projection();
      writes.output = input.data();
      writes.output_stride = hidden;
      cuda::linear(writes, nullptr);
      next();
      DeviceLinearArgs projection = problem.projection();
      projection.input = input.data();
      DeviceAttentionArgs attention = problem.attention();
      attention.output = attended.data();
      attention.output_stride = width;
      cuda::qkv_attention(projection, attention, nullptr);
      next();
      DeviceLinearArgs reads = behind.projection();
      reads.input = attended.data();
      reads.output = output.data();
      reads.output_stride = 3 * kHeadDim;
      cuda::linear(reads, nullptr);
      MOQ_CUDA_CHECK(cudaDeviceSynchronize());
      return output.read();
    };
    const std::vector<std::byte> expected = run(true);
    for (const float value : from_bytes(expected, DType::kFloat16)) {
      ASSERT_TRUE(std::isfinite(value));
    }
    for (int i = 0; i < 5; ++i) {
      EXPECT_EQ(run(false), expected) << "hidden " << hidden;
    }
  }
}

using HeadsAndHidden = std::pair<std::int64_t, std::int64_t>;

class QkvAttentionCudaWidths
    : public ::testing::TestWithParam<std::tuple<HeadsAndHidden, WeightFormat>> {
  void SetUp() override { MOQ_SKIP_WITHOUT_QKV_ATTENTION(); }
};

TEST_P(QkvAttentionCudaWidths, AreRight) {
  const auto& [size, format] = GetParam();
  for (const std::vector<std::int32_t>& lengths : {std::vector<std::int32_t>{100, 128}, {50}}) {
    expect_exact(
        {.num_heads = size.first, .hidden = size.second, .format = format, .lengths = lengths});
  }
}

// Columns that are no multiple of a step (64), fewer than a ring has, an odd number of steps for
// two warpgroups; more clusters than run at once.
INSTANTIATE_TEST_SUITE_P(
    Sizes, QkvAttentionCudaWidths,
    ::testing::Combine(::testing::Values(HeadsAndHidden{1, 8}, HeadsAndHidden{1, 40},
                                         HeadsAndHidden{2, 72}, HeadsAndHidden{1, 576},
                                         HeadsAndHidden{12, 768}, HeadsAndHidden{16, 1024},
                                         HeadsAndHidden{3, 1088}, HeadsAndHidden{70, 64},
                                         HeadsAndHidden{40, 200}),
                       ::testing::Values(WeightFormat::kInt8, WeightFormat::kFloat16)));

TEST_F(QkvAttentionCudaTest, HalvesColumnsWhereThereIsRoom) {
  const auto halves = [](const QkvSetup& setup) {
    const QkvAttentionProblem problem(setup);
    return cuda::qkv_attention_halves(problem.projection(), problem.attention());
  };
  // A multiprocessor has one block; some of a GPU's groups of them hold a cluster of six less.
  const std::int64_t room = cuda::device_limits().multiprocessors / 6;
  EXPECT_TRUE(halves({.num_heads = room / 2, .hidden = 1024}));
  EXPECT_FALSE(halves({.num_heads = room + 1, .hidden = 1024}));
  EXPECT_FALSE(halves({.num_heads = 2, .hidden = 1024, .lengths = {64}}));
  EXPECT_FALSE(halves({.num_heads = 2, .hidden = 768}));
}

TEST_F(QkvAttentionCudaTest, IsPreferredWhereAllHeadsRunAtOnce) {
  const auto prefers = [](const QkvSetup& setup) {
    const QkvAttentionProblem problem(setup);
    return cuda::prefers_qkv_attention(problem.projection(), problem.attention());
  };
  const std::int64_t room = 2 * cuda::device_limits().multiprocessors / 6;
  EXPECT_TRUE(prefers({}));
  EXPECT_TRUE(prefers({.num_heads = room * 3 / 4}));
  EXPECT_FALSE(prefers({.num_heads = room + 1}));
  EXPECT_TRUE(prefers({.num_heads = 2, .lengths = {9}}));
  EXPECT_FALSE(prefers({.num_heads = 2, .lengths = {8}}));
  EXPECT_FALSE(prefers({.num_heads = 2, .lengths = {129}}));
}

using Change = void (*)(DeviceLinearArgs&, DeviceAttentionArgs&);

/// What the kernel does not compute, and what its error says.
struct Unsuited {
  const char* message;
  Change change;
};

class QkvAttentionCudaUnsuited : public ::testing::TestWithParam<Unsuited> {
  void SetUp() override { MOQ_SKIP_WITHOUT_QKV_ATTENTION(); }
};

TEST_P(QkvAttentionCudaUnsuited, IsNeitherPreferredNorComputed) {
  const QkvAttentionProblem problem({});
  DeviceLinearArgs projection = problem.projection();
  DeviceAttentionArgs attention = problem.attention();
  GetParam().change(projection, attention);
  EXPECT_FALSE(cuda::prefers_qkv_attention(projection, attention));
  const std::string error = error_of([&] { cuda::qkv_attention(projection, attention, nullptr); });
  EXPECT_NE(error.find(GetParam().message), std::string::npos) << error;
}

constexpr const char* kHeads = "got 3 heads of ";
constexpr const char* kBetween = "must be the projection's results as they are";
constexpr const char* kWeights = "needs compute capability 9.0, 16-bit activations";
std::byte* shifted(const void* pointer) {
  return static_cast<std::byte*>(const_cast<void*>(pointer)) + 8;
}

INSTANTIATE_TEST_SUITE_P(
    Cases, QkvAttentionCudaUnsuited,
    ::testing::Values(
        Unsuited{kHeads, [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.num_kv_heads = 1; }},
        Unsuited{kHeads, [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.head_dim = 96; }},
        Unsuited{kHeads, [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.max_tokens = 129; }},
        Unsuited{kHeads, [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.weight.shape.n -= 64; }},
        Unsuited{kBetween, [](DeviceLinearArgs& p,
                              DeviceAttentionArgs&) { p.activation = Activation::kGelu; }},
        Unsuited{kBetween, [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.residual = p.input; }},
        Unsuited{kBetween,
                 [](DeviceLinearArgs& p, DeviceAttentionArgs&) {
                   p.row_scales = static_cast<const float*>(p.input);
                 }},
        Unsuited{kBetween, [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.gated = true; }},
        Unsuited{kBetween,
                 [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.float32_output = true; }},
        Unsuited{kBetween,
                 [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.qkv.rotary.rotary_dim = 64; }},
        Unsuited{kBetween,
                 [](DeviceLinearArgs& p, DeviceAttentionArgs& a) { p.qkv.pages.keys = a.output; }},
        Unsuited{kBetween,
                 [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.pages.keys = a.output; }},
        Unsuited{kBetween,
                 [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.dtype = DType::kBFloat16; }},
        Unsuited{kWeights, [](DeviceLinearArgs& p,
                              DeviceAttentionArgs&) { p.norm.kind = NormKind::kLayerNorm; }},
        Unsuited{kWeights,
                 [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.weight.shape.group_size = 96; }},
        Unsuited{kWeights, [](DeviceLinearArgs& p,
                              DeviceAttentionArgs& a) { p.dtype = a.dtype = DType::kFloat32; }},
        Unsuited{kWeights,
                 [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.input = shifted(p.input); }},
        Unsuited{kWeights, [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.input_stride += 1; }},
        Unsuited{"output_stride must be a multiple of 8",
                 [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.output_stride += 1; }},
        Unsuited{"the output aligned to 16 bytes",
                 [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.output = shifted(a.output); }}));

TEST_F(QkvAttentionCudaTest, WrongArgumentsAreRefused) {
  const QkvAttentionProblem problem({});
  const auto expect_error = [&](const char* message, Change change) {
    DeviceLinearArgs projection = problem.projection();
    DeviceAttentionArgs attention = problem.attention();
    change(projection, attention);
    const std::string error =
        error_of([&] { cuda::qkv_attention(projection, attention, nullptr); });
    EXPECT_NE(error.find(message), std::string::npos) << error;
  };
  expect_error("attention.output must not be null",
               [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.output = nullptr; });
  expect_error("attention.sequences must not be null",
               [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.sequences = nullptr; });
  expect_error("projection.input must not be null",
               [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.input = nullptr; });
  expect_error(
      "a packed weight must be aligned to 128 bytes",
      [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.weight.data = shifted(p.weight.data); });
  expect_error("attention.scale must be > 0, got 0",
               [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.scale = 0.0F; });
  expect_error("projection.input_stride must be >= k, got 184 and 192",
               [](DeviceLinearArgs& p, DeviceAttentionArgs&) { p.input_stride = 184; });
  expect_error("attention.output_stride must be a multiple of 8 and >= 192",
               [](DeviceLinearArgs&, DeviceAttentionArgs& a) { a.output_stride = 184; });
}

}  // namespace
}  // namespace moq::kernels::testing
