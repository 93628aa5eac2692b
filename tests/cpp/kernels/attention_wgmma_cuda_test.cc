// wide_attention against the definition in float64, at shapes that the choice of a kernel would
// mostly leave to others: whatever rows, heads and dimensions it may get.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/device.h"
#include "tests/cpp/kernels/attention_cuda_problem.h"
#include "tests/cpp/kernels/device.h"

#define MOQ_SKIP_WITHOUT_WIDE_ATTENTION(ARGS)                                   \
  do {                                                                          \
    if (!cuda::can_wide(ARGS)) {                                                \
      GTEST_SKIP() << "wide_attention does not take these, or not on this GPU"; \
    }                                                                           \
  } while (false)

namespace moq::kernels::testing {
namespace {

/// Ends of rows of a warp (16), a warpgroup (64) and blocks (128, 192, 256), and of tiles of keys
/// (64, 128); sequences of no token, one token, and with more tokens than others.
const std::vector<SequenceLengths> kEnds = {{1, 0},  {16, 0},  {17, 47}, {0, 9},     {63, 1},
                                            {64, 0}, {65, 63}, {0, 0},   {129, 127}, {1, 256}};

void expect_exact_bits(const AttentionBatch& batch) {
  const DeviceAttentionArgs args = batch.args();
  MOQ_SKIP_WITHOUT_WIDE_ATTENTION(args);
  const auto launch = [&] { cuda::wide_attention(args, nullptr); };
  const std::vector<float> output = batch.compute(launch);
  batch.expect_exact(output);
  EXPECT_EQ(batch.compute(launch), output);
}

class AttentionWgmmaCuda
    : public ::testing::TestWithParam<std::tuple<std::int64_t, HeadCounts, DType, KeyStorage>> {
 protected:
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
  void expect_exact(bool causal, bool alibi) const {
    const auto& [head_dim, heads, dtype, storage] = GetParam();
    expect_exact_bits(AttentionBatch({heads, head_dim, dtype, storage, kEnds, causal, alibi}));
  }
};

TEST_P(AttentionWgmmaCuda, SeesThePast) {
  expect_exact(/*causal=*/true, /*alibi=*/false);
}

TEST_P(AttentionWgmmaCuda, SeesBothDirectionsByDistance) {
  expect_exact(/*causal=*/false, /*alibi=*/true);
}

const auto kHalves = ::testing::Values(DType::kFloat16, DType::kBFloat16);
const auto kOfSixteenBits = ::testing::Values(KeyStorage::kPacked, KeyStorage::kPages);

// Every compiled number of dimensions, and less than all of them.
INSTANTIATE_TEST_SUITE_P(Dims, AttentionWgmmaCuda,
                         ::testing::Combine(::testing::Values(8, 24, 40, 56, 64, 72, 80, 88, 96,
                                                              104, 120, 128, 136, 152, 160, 168,
                                                              192, 200, 248, 256),
                                            ::testing::Values(HeadCounts{3, 1}), kHalves,
                                            kOfSixteenBits));
// Heads that divide no block's rows, and more of them than a block has rows.
INSTANTIATE_TEST_SUITE_P(Heads, AttentionWgmmaCuda,
                         ::testing::Combine(::testing::Values(64, 128),
                                            ::testing::Values(HeadCounts{1, 1}, HeadCounts{5, 5},
                                                              HeadCounts{16, 2}, HeadCounts{35, 1},
                                                              HeadCounts{260, 1}),
                                            kHalves, kOfSixteenBits));

class AttentionWgmmaCudaTest : public ::testing::Test {
  void SetUp() override { MOQ_SKIP_WITHOUT_GPU(); }
};

/// Blocks of 256 rows where head_dim is at most 64 and a sequence has more than two of them. A ring
/// of four stages goes round several times.
TEST_F(AttentionWgmmaCudaTest, BlocksOf256RowsAreRight) {
  for (const std::int64_t head_dim : {16, 48, 64}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (const bool causal : {false, true}) {
        expect_exact_bits(AttentionBatch({{3, 3},
                                          head_dim,
                                          dtype,
                                          KeyStorage::kPages,
                                          {{769, 0}, {257, 512}, {0, 3}, {255, 1}, {1, 0}},
                                          causal,
                                          /*alibi=*/causal}));
      }
    }
  }
}

/// Blocks of 192 rows where head_dim is in (96, 160] and there are three of them, or more, for each
/// multiprocessor: 432.
TEST_F(AttentionWgmmaCudaTest, BlocksOf192RowsAreRight) {
  constexpr std::int64_t kMostMultiprocessors = 432 / 3;
  if (cuda::device_limits().multiprocessors > kMostMultiprocessors) {
    GTEST_SKIP() << "this GPU has too many multiprocessors for blocks of 192 rows";
  }
  for (const std::int64_t head_dim : {104, 128, 136, 152, 160}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (const KeyStorage storage : {KeyStorage::kPages, KeyStorage::kPacked}) {
        for (const bool causal : {false, true}) {
          expect_exact_bits(
              AttentionBatch({{24, 24},
                              head_dim,
                              dtype,
                              storage,
                              {{385, 0}, {193, 0}, {0, 0}, {192, 70}, {191, 1}, {1, 200}},
                              causal,
                              /*alibi=*/causal}));
        }
      }
    }
  }
}

TEST_F(AttentionWgmmaCudaTest, LargeScoresStayFinite) {
  for (const std::int64_t head_dim : {64, 128}) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      const AttentionBatch batch({{4, 2},
                                  head_dim,
                                  dtype,
                                  KeyStorage::kPages,
                                  {{300, 0}, {70, 190}},
                                  /*causal=*/true,
                                  /*alibi=*/false,
                                  /*query_scale=*/300.0F});
      const DeviceAttentionArgs args = batch.args();
      MOQ_SKIP_WITHOUT_WIDE_ATTENTION(args);
      for (const float value : batch.compute([&] { cuda::wide_attention(args, nullptr); })) {
        ASSERT_TRUE(std::isfinite(value));
      }
    }
  }
}

/// Nothing but device memory tells how long sequences are: a captured launch serves shorter ones,
/// empty ones among them, and those with another past.
TEST_F(AttentionWgmmaCudaTest, ACapturedLaunchServesAnyLength) {
  AttentionBatch batch(
      {{4, 2}, 128, DType::kFloat16, KeyStorage::kPages, {{200, 0}, {90, 300}, {1, 70}}});
  const DeviceAttentionArgs args = batch.args();
  MOQ_SKIP_WITHOUT_WIDE_ATTENTION(args);
  const std::vector<DeviceSequence> whole = batch.sequences();
  const CapturedGraph graph([&](cudaStream_t stream) { cuda::wide_attention(args, stream); });
  for (const std::int32_t fewer : {0, 1, 73, 199, 300}) {
    for (std::size_t i = 0; i < whole.size(); ++i) {
      batch.sequences()[i].num_tokens = std::max(0, whole[i].num_tokens - fewer);
      batch.sequences()[i].past_length = std::max(0, whole[i].past_length - fewer);
    }
    batch.upload_sequences();
    batch.expect_exact(batch.compute([&] { graph.launch(); }));
  }
}

TEST_F(AttentionWgmmaCudaTest, IsNotForEveryRow) {
  const AttentionBatch batch({{4, 2}, 64, DType::kFloat16, KeyStorage::kPages, {{300, 0}}});
  const DeviceAttentionArgs good = batch.args();
  MOQ_SKIP_WITHOUT_WIDE_ATTENTION(good);
  const auto takes = [&](const auto& change) {
    DeviceAttentionArgs args = good;
    change(args);
    return cuda::can_wide(args);
  };
  EXPECT_FALSE(takes([](auto& args) { args.head_dim = 63; }));
  EXPECT_FALSE(takes([](auto& args) { args.head_dim = 60; }));
  EXPECT_FALSE(takes([](auto& args) { args.dtype = DType::kFloat32; }));
  EXPECT_FALSE(takes([](auto& args) { args.pages.dtype = DType::kInt8; }));
  EXPECT_FALSE(takes([](auto& args) { args.query_stride += 4; }));
  EXPECT_FALSE(takes([](auto& args) { args.output_stride += 1; }));
  EXPECT_FALSE(takes([](auto& args) { args.query = static_cast<const char*>(args.query) + 8; }));
  EXPECT_FALSE(takes([](auto& args) { args.output = static_cast<char*>(args.output) + 2; }));
  EXPECT_FALSE(
      takes([](auto& args) { args.pages.values = static_cast<char*>(args.pages.values) + 8; }));
}

}  // namespace
}  // namespace moq::kernels::testing
