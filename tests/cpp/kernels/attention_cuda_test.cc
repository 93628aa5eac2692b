// Attention on a GPU against the definition in float64, by the kernel that is chosen. That of many
// queries on compute capability 9.0 has tests of its own in attention_wgmma_cuda_test.cc.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/attention.h"
#include "kernels/common/check.h"
#include "kernels/embedding.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/kernels/attention_cuda_problem.h"
#include "tests/cpp/kernels/device.h"
#include "tests/cpp/kernels/written_late.h"

namespace moq::kernels::testing {
namespace {

using test::error_of;

// ----------------------------------------------------------------------------------- every shape

const std::vector<SequenceLengths> kDecode = {{1, 0},  {1, 1},   {1, 62}, {0, 40}, {1, 63},
                                              {1, 64}, {1, 126}, {0, 0},  {1, 999}};
const std::vector<SequenceLengths> kChunks = {{1, 0},    {2, 0},  {63, 0},  {0, 9},   {64, 64},
                                              {65, 100}, {7, 57}, {127, 0}, {130, 1}, {3, 300}};
const std::vector<SequenceLengths> kFew = {{2, 0}, {1, 63}, {2, 64}, {0, 5}, {2, 510}, {1, 0}};

using Axes = std::tuple<std::int64_t, HeadCounts, DType, KeyStorage>;

class AttentionCuda : public ::testing::TestWithParam<Axes> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  void expect_exact(const std::vector<SequenceLengths>& lengths, bool causal, bool alibi) const {
    const auto& [head_dim, heads, dtype, storage] = GetParam();
    const AttentionBatch batch({heads, head_dim, dtype, storage, lengths, causal, alibi});
    const std::vector<float> output = batch.compute();
    batch.expect_exact(output);
    EXPECT_EQ(batch.compute(/*past_is_ready=*/true), output);
  }
};

TEST_P(AttentionCuda, DecodesATokenOfEachSequence) {
  expect_exact(kDecode, true, false);
}

TEST_P(AttentionCuda, TakesFewTokensAtOnce) {
  expect_exact(kFew, true, true);
}

TEST_P(AttentionCuda, TakesChunksOfPrompts) {
  expect_exact(kChunks, true, std::get<HeadCounts>(GetParam()).num_heads % 2 == 0);
}

TEST_P(AttentionCuda, SeesBothDirections) {
  expect_exact(kChunks, false, std::get<HeadCounts>(GetParam()).num_heads == 3);
}

const auto kDTypes = ::testing::Values(DType::kFloat16, DType::kBFloat16, DType::kFloat32);
const auto kStorages =
    ::testing::Values(KeyStorage::kPacked, KeyStorage::kPages, KeyStorage::kCodes);

INSTANTIATE_TEST_SUITE_P(Dims, AttentionCuda,
                         ::testing::Combine(::testing::Values(1, 8, 32, 33, 64, 72, 80, 96, 112,
                                                              128, 152, 160, 192, 256),
                                            ::testing::Values(HeadCounts{3, 1}), kDTypes,
                                            kStorages));
INSTANTIATE_TEST_SUITE_P(Heads, AttentionCuda,
                         ::testing::Combine(::testing::Values(64),
                                            ::testing::Values(HeadCounts{1, 1}, HeadCounts{25, 25},
                                                              HeadCounts{16, 2}, HeadCounts{6, 2},
                                                              HeadCounts{35, 1}),
                                            kDTypes, kStorages));

// -------------------------------------------------------------------------- less than 128 rows

/// Too few rows for the kernel of compute capability 9.0, too many to split their keys.
const std::vector<SequenceLengths> kShort = {{17, 0},  {100, 0}, {1, 0},  {33, 70},
                                             {64, 64}, {0, 5},   {65, 3}, {99, 130}};

class AttentionCudaShort : public AttentionCuda {};

TEST_P(AttentionCudaShort, SeesThePast) {
  expect_exact(kShort, /*causal=*/true, /*alibi=*/false);
}

TEST_P(AttentionCudaShort, SeesBothDirectionsByDistance) {
  expect_exact(kShort, /*causal=*/false, /*alibi=*/true);
}

/// Blocks that fill the GPU three times: up to 128 dimensions, a warp takes two tiles of rows.
TEST_P(AttentionCudaShort, TakesManySequences) {
  std::vector<SequenceLengths> lengths;
  for (std::int32_t i = 0; i < 450 / std::get<HeadCounts>(GetParam()).num_kv_heads; ++i) {
    lengths.push_back({17 + i * 37 % 84, i * 11 % 70});
  }
  expect_exact(lengths, /*causal=*/true, /*alibi=*/false);
}

const auto kHalves = ::testing::Values(DType::kFloat16, DType::kBFloat16);
const auto kOfSixteenBits = ::testing::Values(KeyStorage::kPacked, KeyStorage::kPages);

INSTANTIATE_TEST_SUITE_P(Dims, AttentionCudaShort,
                         ::testing::Combine(::testing::Values(72, 80, 96, 128, 152),
                                            ::testing::Values(HeadCounts{1, 1}), kHalves,
                                            kOfSixteenBits));
INSTANTIATE_TEST_SUITE_P(Heads, AttentionCudaShort,
                         ::testing::Combine(::testing::Values(80, 96, 128),
                                            ::testing::Values(HeadCounts{7, 7}), kHalves,
                                            kOfSixteenBits));

// ----------------------------------------------------------------------------------------- rest

class AttentionCudaTest : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

TEST_F(AttentionCudaTest, ManyHeadsOfWideTilesAreRight) {
  for (const std::int64_t head_dim : {32, 64, 80, 96, 128, 152, 256}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      const AttentionBatch batch({{36, 36},
                                  head_dim,
                                  dtype,
                                  KeyStorage::kPages,
                                  {{129, 0}, {1, 200}, {127, 70}, {140, 0}, {0, 0}, {130, 3}}});
      batch.expect_exact(batch.compute());
    }
  }
}

TEST_F(AttentionCudaTest, PromptsOfManyTilesAreRight) {
  for (const std::int64_t head_dim : {64, 72, 96, 128, 152, 256}) {
    for (const bool causal : {false, true}) {
      const AttentionBatch batch({{4, 2},
                                  head_dim,
                                  DType::kFloat16,
                                  KeyStorage::kPages,
                                  {{700, 0}, {1, 3}, {190, 515}},
                                  causal,
                                  /*alibi=*/head_dim == 128});
      batch.expect_exact(batch.compute());
    }
  }
}

TEST_F(AttentionCudaTest, LargeScoresStayFinite) {
  for (const KeyStorage storage : {KeyStorage::kPages, KeyStorage::kCodes}) {
    const AttentionBatch batch(
        {{4, 2}, 64, DType::kBFloat16, storage, {{40, 0}, {70, 90}}, true, false, 300.0F});
    for (const float value : batch.compute()) {
      ASSERT_TRUE(std::isfinite(value));
    }
  }
}

TEST_F(AttentionCudaTest, ACapturedLaunchServesAnyLength) {
  AttentionBatch batch(
      {{8, 2}, 64, DType::kFloat16, KeyStorage::kPages, {{1, 900}, {1, 700}, {1, 70}}});
  const std::vector<DeviceSequence> whole = batch.sequences();
  const CapturedGraph graph([&](cudaStream_t stream) {
    DeviceAttentionArgs args = batch.args();
    cuda::attention(args, stream);
    args.past_is_ready = true;
    cuda::attention(args, stream);
  });
  for (const std::int32_t shorter : {0, 1, 400, 700}) {
    for (std::size_t i = 0; i < whole.size(); ++i) {
      batch.sequences()[i].past_length = std::max(0, whole[i].past_length - shorter);
    }
    batch.upload_sequences();
    graph.launch();
    batch.expect_exact(batch.read());
  }
}

/// An embedding lets attention begin when what is ahead of it has ended, so that this may read
/// before it waits what has been written there: the last of many bytes.
TEST_F(AttentionCudaTest, ReadsSequencesWrittenAheadOfAnEmbeddingBeforeItWaits) {
  constexpr std::size_t kAhead = 500'000;  // sequences
  AttentionBatch batch(
      {{8, 2}, 64, DType::kFloat16, KeyStorage::kPages, {{1, 900}, {1, 700}, {40, 30}}});
  std::vector<DeviceSequence> inputs(kAhead + batch.sequences().size());
  std::ranges::copy(batch.sequences(), inputs.begin() + kAhead);
  const Buffer inputs_dev(inputs);
  const WrittenLate late(inputs_dev.data(),
                         static_cast<std::int64_t>(inputs.size() * sizeof(DeviceSequence)));
  const Buffer table(std::vector<float>(64));
  const Buffer rows(std::vector<std::int32_t>(1));
  const Buffer embedded(64 * sizeof(float));
  DeviceEmbeddingArgs embedding{.num_lookups = 1,
                                .output = embedded.data(),
                                .num_tokens = 1,
                                .hidden_size = 64,
                                .dtype = DType::kFloat32};
  embedding.lookups[0] = {
      .data = table.data(), .dtype = DType::kFloat32, .rows = rows.as<std::int32_t>()};
  DeviceAttentionArgs args = batch.args();
  args.sequences = inputs_dev.as<DeviceSequence>() + kAhead;
  args.past_is_ready = true;
  batch.expect_exact(batch.compute([&] {
    late.write();
    cuda::embedding(embedding, nullptr);
    cuda::attention(args, nullptr);
  }));
}

TEST_F(AttentionCudaTest, TheSameBitsEveryTime) {
  const AttentionBatch batch({{25, 25}, 64, DType::kFloat16, KeyStorage::kPages, {{1, 511}}});
  const std::vector<float> first = batch.compute();
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(batch.compute(), first);
  }
}

TEST_F(AttentionCudaTest, NothingToComputeWritesNothing) {
  const AttentionBatch batch({{2, 1}, 64, DType::kFloat16, KeyStorage::kPages, {{0, 5}, {0, 0}}});
  DeviceAttentionArgs args = batch.args();
  cuda::attention(args, nullptr);
  args.max_tokens = 1;
  cuda::attention(args, nullptr);
  args.max_tokens = 100;
  cuda::attention(args, nullptr);
  args.num_sequences = 0;
  cuda::attention(args, nullptr);
  MOQ_CUDA_CHECK(cudaDeviceSynchronize());
}

TEST_F(AttentionCudaTest, BadArgumentsAreNamed) {
  const AttentionBatch batch({{4, 2}, 64, DType::kFloat16, KeyStorage::kCodes, {{1, 5}}});
  const auto message = [&](const auto& spoil) {
    DeviceAttentionArgs args = batch.args();
    spoil(args);
    return error_of([&] { cuda::attention(args, nullptr); });
  };
  EXPECT_EQ(message([](auto& args) { args.dtype = DType::kInt8; }),
            "attention: dtype must be float16, bfloat16 or float32, got int8");
  EXPECT_EQ(message([](auto& args) { args.num_kv_heads = 3; }),
            "attention: num_heads must be a multiple of num_kv_heads, got 4 and 3");
  EXPECT_EQ(message([](auto& args) { args.head_dim = 257; }),
            "attention: head_dim must be in [1, 256], got 257");
  EXPECT_EQ(message([](auto& args) { args.scale = 0.0F; }), "attention: scale must be > 0, got 0");
  EXPECT_EQ(message([](auto& args) { args.output = nullptr; }),
            "attention: output must not be null");
  EXPECT_EQ(message([](auto& args) { args.page_table = nullptr; }),
            "attention: pages need a page_table");
  EXPECT_EQ(message([](auto& args) { args.pages.value_scales = nullptr; }),
            "attention: int8 pages need key_scales and value_scales");
  EXPECT_EQ(message([](auto& args) { args.pages.dtype = DType::kFloat32; }),
            "attention: pages must be int8 or float16 as the activations, got float32");
  EXPECT_EQ(message([](auto& args) { args.query_stride = 255; }),
            "attention: query_stride and output_stride must be >= 256, got 255 and 264");
}

}  // namespace
}  // namespace moq::kernels::testing
