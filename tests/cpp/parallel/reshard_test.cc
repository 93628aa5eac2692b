// Split then merge is the identity on (codes, scales): guarantee 6 of the checkpoint format.
#include "inference/parallel/reshard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

/// A tensor of the checkpoint, as bytes.
using Bytes = std::vector<std::byte>;

Bytes random_bytes(std::int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  Bytes bytes(static_cast<std::size_t>(count));
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::byte>(generator()); });
  return bytes;
}

Bytes take(const Bytes& whole, const AxisView& view, const std::vector<std::int64_t>& indices) {
  Bytes part(static_cast<std::size_t>(view.outer * view.inner_bytes) * indices.size());
  gather(whole, view, indices, part);
  return part;
}

/// Splits along `view` by the maps of all ranks and merges the parts into fresh memory.
Bytes split_and_merge(const Bytes& whole, const AxisView& view,
                      const std::vector<std::vector<std::int64_t>>& maps) {
  std::vector<Bytes> parts;
  for (const auto& map : maps) {
    parts.push_back(take(whole, view, map));
  }
  Bytes merged(whole.size(), std::byte{0xa5});
  for (std::size_t rank = 0; rank < maps.size(); ++rank) {
    scatter(parts[rank], view, maps[rank], merged);
  }
  return merged;
}

struct ShapeCase {
  QkvShape shape;
  const char* name;
};

class QkvResharding : public testing::TestWithParam<std::tuple<QkvOrder, ShapeCase>> {
 protected:
  QkvOrder order() const { return std::get<0>(GetParam()); }
  QkvShape shape() const { return std::get<1>(GetParam()).shape; }
  std::vector<std::vector<std::int64_t>> maps(std::int64_t size) const {
    std::vector<std::vector<std::int64_t>> maps;
    for (std::int64_t rank = 0; rank < size; ++rank) {
      maps.push_back(qkv_rows(order(), shape(),
                              shard_heads(shape().num_heads, shape().num_kv_heads, rank, size)));
    }
    return maps;
  }
  /// 0 for a pair that is refused: there is no elementwise order with grouped queries.
  std::int64_t largest_degree() const {
    const bool grouped = shape().num_heads != shape().num_kv_heads;
    return order() == QkvOrder::kElementwise && grouped ? 0 : shape().num_heads;
  }
};

TEST_P(QkvResharding, RestoresCodesAndScalesForEveryDegree) {
  const std::int64_t rows = shape().rows();
  const AxisView codes_view{1, rows, 37};      // int8 codes [rows, 37]
  const AxisView scales_view{1, rows, 3 * 4};  // float32 scales [rows, 3]
  const Bytes codes = random_bytes(rows * 37, 1);
  const Bytes scales = random_bytes(rows * 12, 2);
  for (std::int64_t size = 1; size <= largest_degree(); ++size) {
    EXPECT_EQ(split_and_merge(codes, codes_view, maps(size)), codes) << "degree " << size;
    EXPECT_EQ(split_and_merge(scales, scales_view, maps(size)), scales) << "degree " << size;
  }
}

TEST_P(QkvResharding, RestoresAWeightThatIsStoredTransposed) {
  const std::int64_t columns = shape().rows();
  const AxisView view{5, columns, 1};  // int8 codes [5, columns]
  const Bytes codes = random_bytes(5 * columns, 3);
  for (std::int64_t size = 1; size <= largest_degree(); ++size) {
    EXPECT_EQ(split_and_merge(codes, view, maps(size)), codes) << "degree " << size;
  }
}

TEST_P(QkvResharding, ShardsAreTheSameWhateverTheOrderOfTheFile) {
  if (largest_degree() == 0) {
    EXPECT_THROW(maps(1), Error);
    return;
  }
  // Writing the concatenated weight in this order and sharding it must give what sharding the
  // concatenated one gives.
  const AxisView view{1, shape().rows(), 8};
  const Bytes concatenated = random_bytes(shape().rows() * 8, 4);
  Bytes reordered(concatenated.size());
  scatter(concatenated, view, maps(1)[0], reordered);
  for (std::int64_t size = 1; size <= largest_degree(); ++size) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const HeadShard shard = shard_heads(shape().num_heads, shape().num_kv_heads, rank, size);
      EXPECT_EQ(take(reordered, view, qkv_rows(order(), shape(), shard)),
                take(concatenated, view, qkv_rows(QkvOrder::kConcatenated, shape(), shard)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    OrdersAndShapes, QkvResharding,
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
  using Rows = std::vector<std::int64_t>;
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

class ColumnResharding : public testing::TestWithParam<std::int64_t> {};

TEST_P(ColumnResharding, RestoresCodesAndScalesForEveryDegree) {
  const std::int64_t rows = 5;
  const std::int64_t columns = 768;
  const std::int64_t group_size = GetParam();
  const AxisView codes_view{rows, columns, 1};
  const AxisView scales_view{rows, columns / group_size, 4};
  const Bytes codes = random_bytes(rows * columns, 5);
  const Bytes scales = random_bytes(rows * columns / group_size * 4, 6);
  for (std::int64_t size = 1; size <= 12; ++size) {
    std::vector<std::vector<std::int64_t>> code_maps;
    std::vector<std::vector<std::int64_t>> scale_maps;
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const Range shard = shard_range(columns, 32, rank, size);
      code_maps.push_back(indices_of(shard));
      scale_maps.push_back(shard_groups(shard, group_size).scale_columns);
    }
    EXPECT_EQ(split_and_merge(codes, codes_view, code_maps), codes) << "degree " << size;
    EXPECT_EQ(split_and_merge(scales, scales_view, scale_maps), scales) << "degree " << size;
  }
}

TEST_P(ColumnResharding, GivesEveryColumnTheScaleItHadInTheWhole) {
  const std::int64_t group_size = GetParam();
  for (std::int64_t size = 1; size <= 12; ++size) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const Range shard = shard_range(768, 32, rank, size);
      const ColumnGroups groups = shard_groups(shard, group_size);
      for (std::int64_t column = 0; column < shard.size(); ++column) {
        EXPECT_EQ(groups.scale_columns[static_cast<std::size_t>(column / groups.group_size)],
                  (shard.begin + column) / group_size);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(GroupSizes, ColumnResharding, testing::Values(1, 32, 64, 96, 128, 768));

TEST(ShardGroups, KeepTheGroupSizeWhereTheCutFallsBetweenGroups) {
  const ColumnGroups groups = shard_groups({128, 384}, 64);
  EXPECT_EQ(groups.group_size, 64);
  EXPECT_EQ(groups.scale_columns, (std::vector<std::int64_t>{2, 3, 4, 5}));
}

TEST(ShardGroups, RefuseAGroupOfNothing) {
  EXPECT_THROW(shard_groups({0, 64}, 0), Error);
}

TEST(Gather, RefusesAnIndexOutsideTheTensor) {
  const Bytes whole = random_bytes(12, 7);
  const std::vector<std::int64_t> indices = {0, 3};
  Bytes part(8);
  EXPECT_THROW(gather(whole, {1, 3, 4}, indices, part), Error);
}

TEST(Gather, RefusesSpansOfAnotherSizeThanTheViewSays) {
  const Bytes whole = random_bytes(12, 8);
  const std::vector<std::int64_t> indices = {0, 2};
  Bytes part(8);
  EXPECT_THROW(gather(whole, {1, 4, 4}, indices, part), Error);
  EXPECT_THROW(gather(whole, {1, 3, 4}, indices, std::span(part).first(7)), Error);
}

}  // namespace
}  // namespace moq::inference
