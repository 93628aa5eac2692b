// Cutting a transformer into tensor-parallel shards. The sizes are small enough to try every
// degree.
#include "inference/parallel/sharding.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "tests/cpp/error_of.h"

namespace moq::inference {
namespace {

using test::error_of;

struct HeadCounts {
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
};

/// Every (num_heads, num_kv_heads) up to 32 heads, and the models that peers refuse on two ranks.
std::vector<HeadCounts> all_head_counts() {
  std::vector<HeadCounts> all = {{64, 8}, {71, 1}};
  for (std::int64_t num_heads = 1; num_heads <= 32; ++num_heads) {
    for (std::int64_t num_kv_heads = 1; num_kv_heads <= num_heads; ++num_kv_heads) {
      if (num_heads % num_kv_heads == 0) {
        all.push_back({num_heads, num_kv_heads});
      }
    }
  }
  return all;
}

class ShardHeads : public testing::TestWithParam<HeadCounts> {
 protected:
  /// Calls check(size, shards of all ranks) for every degree that works.
  template <typename Check>
  void for_every_degree(Check check) const {
    const auto [num_heads, num_kv_heads] = GetParam();
    for (std::int64_t size = 1; size <= num_heads; ++size) {
      std::vector<HeadShard> shards;
      for (std::int64_t rank = 0; rank < size; ++rank) {
        shards.push_back(shard_heads(num_heads, num_kv_heads, rank, size));
      }
      SCOPED_TRACE("degree " + std::to_string(size));
      check(size, shards);
    }
  }
};

TEST_P(ShardHeads, CoverEveryQueryHeadOnceInRankOrder) {
  for_every_degree([](std::int64_t, const std::vector<HeadShard>& shards) {
    std::int64_t next = 0;
    for (const HeadShard& shard : shards) {
      EXPECT_EQ(shard.query_heads.begin, next);
      EXPECT_GE(shard.query_heads.size(), 1);
      next = shard.query_heads.end;
    }
    EXPECT_EQ(next, GetParam().num_heads);
  });
}

TEST_P(ShardHeads, HoldExactlyTheKvHeadsOfTheirQueryHeads) {
  for_every_degree([](std::int64_t, const std::vector<HeadShard>& shards) {
    const std::int64_t group = GetParam().num_heads / GetParam().num_kv_heads;
    for (const HeadShard& shard : shards) {
      EXPECT_EQ(shard.kv_heads.begin, shard.query_heads.begin / group);
      EXPECT_EQ(shard.kv_heads.end, (shard.query_heads.end - 1) / group + 1);
    }
  });
}

TEST_P(ShardHeads, KeepTheGroupingThatAttentionKernelsExpect) {
  for_every_degree([](std::int64_t, const std::vector<HeadShard>& shards) {
    const std::int64_t group = GetParam().num_heads / GetParam().num_kv_heads;
    for (const HeadShard& shard : shards) {
      ASSERT_EQ(shard.query_heads.size() % shard.kv_heads.size(), 0);
      const std::int64_t local_group = shard.query_heads.size() / shard.kv_heads.size();
      for (std::int64_t head = 0; head < shard.query_heads.size(); ++head) {
        EXPECT_EQ(shard.kv_heads.begin + head / local_group,
                  (shard.query_heads.begin + head) / group);
      }
    }
  });
}

TEST_P(ShardHeads, ReplicateKvHeadsOnlyWhenThereAreMoreRanksThanKvHeads) {
  for_every_degree([](std::int64_t size, const std::vector<HeadShard>& shards) {
    std::int64_t kept = 0;
    for (const HeadShard& shard : shards) {
      kept += shard.kv_heads.size();
    }
    EXPECT_EQ(kept, std::max(size, GetParam().num_kv_heads));
  });
}

TEST_P(ShardHeads, DifferByAtMostOneKvHead) {
  for_every_degree([](std::int64_t size, const std::vector<HeadShard>& shards) {
    for (const HeadShard& shard : shards) {
      EXPECT_GE(shard.kv_heads.size(), std::max<std::int64_t>(1, GetParam().num_kv_heads / size));
      EXPECT_LE(shard.kv_heads.size(), (GetParam().num_kv_heads + size - 1) / size);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(EveryHeadCount, ShardHeads, testing::ValuesIn(all_head_counts()),
                         [](const auto& info) {
                           return std::to_string(info.param.num_heads) + "_heads_" +
                                  std::to_string(info.param.num_kv_heads) + "_kv";
                         });

TEST(ShardHeadsOfRealModels, DealSmolLm2OnTwoRanksByKvGroup) {
  EXPECT_EQ(shard_heads(9, 3, 0, 2), (HeadShard{{0, 6}, {0, 2}}));
  EXPECT_EQ(shard_heads(9, 3, 1, 2), (HeadShard{{6, 9}, {2, 3}}));
}

TEST(ShardHeadsOfRealModels, DealGpt2XlOnTwoRanks) {
  EXPECT_EQ(shard_heads(25, 25, 0, 2), (HeadShard{{0, 13}, {0, 13}}));
  EXPECT_EQ(shard_heads(25, 25, 1, 2), (HeadShard{{13, 25}, {13, 25}}));
}

TEST(ShardHeadsOfRealModels, SplitTheQueryHeadsOfAGroupOverTheRanksThatShareIt) {
  EXPECT_EQ(shard_heads(9, 3, 0, 4), (HeadShard{{0, 2}, {0, 1}}));
  EXPECT_EQ(shard_heads(9, 3, 1, 4), (HeadShard{{2, 3}, {0, 1}}));
  EXPECT_EQ(shard_heads(9, 3, 2, 4), (HeadShard{{3, 6}, {1, 2}}));
  EXPECT_EQ(shard_heads(9, 3, 3, 4), (HeadShard{{6, 9}, {2, 3}}));
}

TEST(ShardHeadsErrors, NameTheLargestDegreeThatWorks) {
  EXPECT_EQ(error_of([&] { shard_heads(9, 3, 0, 10); }),
            "shard_heads: the tensor-parallel degree must be at most the number of attention "
            "heads, got 10 ranks for 9 heads; the largest degree that works is 9");
}

TEST(ShardHeadsErrors, RefuseKvHeadsThatDoNotDivideTheHeads) {
  EXPECT_THROW(shard_heads(9, 2, 0, 1), Error);
  EXPECT_THROW(shard_heads(9, 0, 0, 1), Error);
  EXPECT_THROW(shard_heads(0, 1, 0, 1), Error);
}

TEST(ShardHeadsErrors, RefuseARankOutsideTheGroup) {
  EXPECT_THROW(shard_heads(8, 8, 2, 2), Error);
  EXPECT_THROW(shard_heads(8, 8, -1, 2), Error);
  EXPECT_THROW(shard_heads(8, 8, 0, 0), Error);
}

struct RangeCase {
  std::int64_t total;
  std::int64_t alignment;
};

class ShardRange : public testing::TestWithParam<RangeCase> {};

TEST_P(ShardRange, CoversTheWholeOnceInRankOrderForEveryDegree) {
  const auto [total, alignment] = GetParam();
  for (std::int64_t size = 1; size <= 33; ++size) {
    std::int64_t next = 0;
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const Range range = shard_range(total, alignment, rank, size);
      EXPECT_EQ(range.begin, next);
      EXPECT_GE(range.size(), 0);
      next = range.end;
    }
    EXPECT_EQ(next, total);
  }
}

TEST_P(ShardRange, CutsOnlyAtMultiplesOfTheAlignment) {
  const auto [total, alignment] = GetParam();
  for (std::int64_t size = 1; size <= 33; ++size) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const Range range = shard_range(total, alignment, rank, size);
      EXPECT_TRUE(range.begin == total || range.begin % alignment == 0);
      EXPECT_TRUE(range.end == total || range.end % alignment == 0);
    }
  }
}

TEST_P(ShardRange, DiffersByAtMostOneBlock) {
  const auto [total, alignment] = GetParam();
  for (std::int64_t size = 1; size <= 33; ++size) {
    const std::int64_t largest = shard_range(total, alignment, 0, size).size();
    for (std::int64_t rank = 0; rank < size; ++rank) {
      const Range range = shard_range(total, alignment, rank, size);
      EXPECT_LE(range.size(), largest);
      EXPECT_GT(range.size() + 2 * alignment, largest);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, ShardRange,
                         testing::Values(RangeCase{0, 1}, RangeCase{1, 1}, RangeCase{1, 64},
                                         RangeCase{97, 1}, RangeCase{97, 8}, RangeCase{1536, 64},
                                         RangeCase{50257, 64}, RangeCase{49152, 32}));

TEST(ShardRangeErrors, RefuseImpossibleArguments) {
  EXPECT_THROW(shard_range(-1, 1, 0, 1), Error);
  EXPECT_THROW(shard_range(8, 0, 0, 1), Error);
  EXPECT_THROW(shard_range(8, 1, 3, 3), Error);
}

}  // namespace
}  // namespace moq::inference
