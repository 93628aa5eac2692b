#include "inference/parallel/reshard.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

struct ShapeCase {
  QkvShape shape;
  const char* name;
};

using Rows = std::vector<std::int64_t>;

class QkvRowsOfRanks : public testing::TestWithParam<std::tuple<QkvOrder, ShapeCase>> {
 protected:
  QkvOrder order() const { return std::get<0>(GetParam()); }
  QkvShape shape() const { return std::get<1>(GetParam()).shape; }
  /// 0 for a pair that is refused: there is no elementwise order with grouped queries.
  std::int64_t largest_degree() const {
    const bool grouped = shape().num_heads != shape().num_kv_heads;
    return order() == QkvOrder::kElementwise && grouped ? 0 : shape().num_heads;
  }
};

TEST_P(QkvRowsOfRanks, TogetherAreAllRowsOfTheProjection) {
  for (std::int64_t size = 1; size <= largest_degree(); ++size) {
    std::set<std::int64_t> rows;
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const HeadShard shard = shard_heads(shape().num_heads, shape().num_kv_heads, rank, size);
      const Rows part = qkv_rows(order(), shape(), shard);
      rows.insert(part.begin(), part.end());
    }
    EXPECT_EQ(static_cast<std::int64_t>(rows.size()), shape().rows()) << "degree " << size;
    EXPECT_EQ(*rows.begin(), 0);
    EXPECT_EQ(*rows.rbegin(), shape().rows() - 1);
  }
}

TEST_P(QkvRowsOfRanks, HoldTheSameWhateverTheOrderOfTheFile) {
  const HeadShard all{{0, shape().num_heads}, {0, shape().num_kv_heads}};
  if (largest_degree() == 0) {
    EXPECT_THROW(qkv_rows(order(), shape(), all), Error);
    return;
  }
  // stored[r]: what row r of the file holds, as a row of the concatenated order.
  const Rows whole = qkv_rows(order(), shape(), all);
  Rows stored(whole.size());
  for (std::size_t i = 0; i < whole.size(); ++i) {
    stored[static_cast<std::size_t>(whole[i])] = static_cast<std::int64_t>(i);
  }
  for (std::int64_t size = 1; size <= largest_degree(); ++size) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const HeadShard shard = shard_heads(shape().num_heads, shape().num_kv_heads, rank, size);
      Rows part = qkv_rows(order(), shape(), shard);
      for (std::int64_t& row : part) {
        row = stored[static_cast<std::size_t>(row)];
      }
      EXPECT_EQ(part, qkv_rows(QkvOrder::kConcatenated, shape(), shard));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    OrdersAndShapes, QkvRowsOfRanks,
    testing::Combine(
        testing::Values(QkvOrder::kConcatenated, QkvOrder::kElementwise, QkvOrder::kPerGroup),
        testing::Values(ShapeCase{{1, 1, 1}, "one"}, ShapeCase{{12, 12, 8}, "gpt2"},
                        ShapeCase{{25, 25, 4}, "gpt2_xl"}, ShapeCase{{9, 3, 7}, "smollm2"},
                        ShapeCase{{14, 2, 5}, "qwen"})),
    [](const auto& info) {
      const QkvOrder order = std::get<0>(info.param);
      const std::string prefix = order == QkvOrder::kConcatenated  ? "concatenated_"
                                 : order == QkvOrder::kElementwise ? "elementwise_"
                                                                   : "per_group_";
      return prefix + std::get<1>(info.param).name;
    });

TEST(QkvRows, FollowTheThreeOrdersOnAShapeSmallEnoughToReadOff) {
  // Two heads of two elements. Fused rows 0..11 of each order, as q0 q0 q1 q1 | k0 k0 k1 k1 | v0 v0
  // v1 v1.
  const QkvShape shape{2, 2, 2};
  const HeadShard all{{0, 2}, {0, 2}};
  EXPECT_EQ(qkv_rows(QkvOrder::kConcatenated, shape, all),
            (Rows{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(qkv_rows(QkvOrder::kElementwise, shape, all),
            (Rows{0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11}));
  EXPECT_EQ(qkv_rows(QkvOrder::kPerGroup, shape, all),
            (Rows{0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11}));
}

TEST(ParseQkvOrder, KnowsTheNamesOfPolicies) {
  EXPECT_EQ(parse_qkv_order("concatenated", "order"), QkvOrder::kConcatenated);
  EXPECT_EQ(parse_qkv_order("elementwise", "order"), QkvOrder::kElementwise);
  EXPECT_EQ(parse_qkv_order("per_group", "order"), QkvOrder::kPerGroup);
  EXPECT_THROW(parse_qkv_order("interleaved", "order"), Error);
}

TEST(QkvRows, TheElementwiseOrderHasNoGroupedQueries) {
  EXPECT_THROW(qkv_rows(QkvOrder::kElementwise, {4, 2, 8}, {{0, 4}, {0, 2}}), Error);
}

TEST(QkvRows, RefuseAShardOutsideTheLayer) {
  EXPECT_THROW(qkv_rows(QkvOrder::kConcatenated, {4, 2, 8}, {{0, 5}, {0, 2}}), Error);
  EXPECT_THROW(qkv_rows(QkvOrder::kConcatenated, {4, 2, 8}, {{0, 4}, {-1, 2}}), Error);
}

TEST(RunsOf, JoinsConsecutiveIndicesAndKeepsTheirOrder) {
  const std::vector<std::int64_t> indices = {4, 5, 6, 0, 1, 9, 8};
  EXPECT_EQ(runs_of(indices), (std::vector<Range>{{4, 7}, {0, 2}, {9, 10}, {8, 9}}));
  EXPECT_TRUE(runs_of({}).empty());
}

}  // namespace
}  // namespace moq::inference
