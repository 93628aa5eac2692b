#include "inference/engine/kv_cache.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <vector>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kHeads = 3;
constexpr std::int64_t kDim = 5;
constexpr std::int64_t kCapacity = 7;

/// A cache whose elements tell the slot that wrote them.
class KvCacheTest : public testing::Test {
 protected:
  std::int64_t make_sequence(std::int64_t length, float mark) {
    const std::int64_t slot = cache_.allocate();
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      for (std::int64_t i = 0; i < kHeads * kCapacity * kDim; ++i) {
        cache_.keys(layer)[slot * kHeads * kCapacity * kDim + i] = mark;
        cache_.values(layer)[slot * kHeads * kCapacity * kDim + i] = -mark;
      }
    }
    cache_.advance(slot, length);
    return slot;
  }

  /// Whether the sequence's tokens carry the mark in every layer and head.
  bool holds(std::int64_t slot, float mark) {
    bool all = true;
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      for (std::int64_t head = 0; head < kHeads; ++head) {
        const std::int64_t first = (slot * kHeads + head) * kCapacity * kDim;
        for (std::int64_t i = 0; i < cache_.length(slot) * kDim; ++i) {
          all = all && cache_.keys(layer)[first + i] == mark &&
                cache_.values(layer)[first + i] == -mark;
        }
      }
    }
    return all;
  }

  HostKvCache cache_{kLayers, kHeads, kDim, 3, kCapacity};
};

TEST_F(KvCacheTest, GivesEverySequenceItsOwnSlot) {
  EXPECT_NE(cache_.allocate(), cache_.allocate());
  EXPECT_EQ(cache_.num_free_slots(), 1);
}

TEST_F(KvCacheTest, RefusesMoreSequencesThanSlots) {
  for (int i = 0; i < 3; ++i) {
    cache_.allocate();
  }
  EXPECT_THROW(cache_.allocate(), Error);
}

TEST_F(KvCacheTest, StartsANewSequenceEmptyWhereAnOldOneWas) {
  const std::int64_t slot = make_sequence(4, 1.0F);
  cache_.free(slot);
  EXPECT_EQ(cache_.length(cache_.allocate()), 0);
}

TEST_F(KvCacheTest, RefusesToFreeTwice) {
  const std::int64_t slot = cache_.allocate();
  cache_.free(slot);
  EXPECT_THROW(cache_.free(slot), Error);
}

TEST_F(KvCacheTest, RefusesTokensBeyondItsCapacity) {
  const std::int64_t slot = make_sequence(kCapacity, 1.0F);
  EXPECT_THROW(cache_.advance(slot, 1), Error);
  EXPECT_EQ(cache_.length(slot), kCapacity);
}

TEST_F(KvCacheTest, ForksACopyThatLivesByItself) {
  const std::int64_t parent = make_sequence(4, 1.0F);
  const std::int64_t child = cache_.fork(parent);
  cache_.truncate(parent, 0);
  EXPECT_EQ(cache_.length(child), 4);
  EXPECT_TRUE(holds(child, 1.0F));
}

TEST_F(KvCacheTest, TruncatesButNeverLengthens) {
  const std::int64_t slot = make_sequence(4, 1.0F);
  cache_.truncate(slot, 2);
  EXPECT_EQ(cache_.length(slot), 2);
  EXPECT_THROW(cache_.truncate(slot, 3), Error);
}

TEST_F(KvCacheTest, ReordersByExchangingSlotsWhereEveryRowHasOneHeir) {
  std::vector<std::int64_t> slots = {make_sequence(1, 1.0F), make_sequence(2, 2.0F),
                                     make_sequence(3, 3.0F)};
  const std::vector<std::int64_t> before = slots;
  cache_.reorder(slots, std::vector<std::int64_t>{2, 0, 1});
  EXPECT_EQ(slots, (std::vector<std::int64_t>{before[2], before[0], before[1]}));
}

TEST_F(KvCacheTest, ReordersByCopyingWhereARowHasSeveralHeirs) {
  std::vector<std::int64_t> slots = {make_sequence(1, 1.0F), make_sequence(2, 2.0F),
                                     make_sequence(3, 3.0F)};
  cache_.reorder(slots, std::vector<std::int64_t>{1, 1, 1});
  EXPECT_EQ(cache_.num_free_slots(), 0);
  for (const std::int64_t slot : slots) {
    EXPECT_EQ(cache_.length(slot), 2);
    EXPECT_TRUE(holds(slot, 2.0F));
  }
}

TEST_F(KvCacheTest, RefusesAReorderSourceThatIsNoRow) {
  std::vector<std::int64_t> slots = {make_sequence(1, 1.0F)};
  EXPECT_THROW(cache_.reorder(slots, std::vector<std::int64_t>{1}), Error);
}

TEST_F(KvCacheTest, RefusesToReorderASlotTwiceOrAFreeOneAndThenChangesNothing) {
  const std::int64_t used = make_sequence(4, 1.0F);
  const std::int64_t other = make_sequence(3, 2.0F);
  const std::int64_t unused = cache_.allocate();
  cache_.free(unused);
  for (const std::int64_t bad : {used, unused, std::int64_t{-1}, std::int64_t{3}}) {
    std::vector<std::int64_t> slots = {other, used, bad};
    EXPECT_THROW(cache_.reorder(slots, std::vector<std::int64_t>{1, 1, 1}), Error);
    EXPECT_EQ(slots, (std::vector<std::int64_t>{other, used, bad}));
    EXPECT_EQ(cache_.length(other), 3);
    EXPECT_EQ(cache_.length(used), 4);
    EXPECT_EQ(cache_.num_free_slots(), 1);
  }
}

TEST(KvCache, RefusesASizeBelowOne) {
  EXPECT_THROW(HostKvCache(1, 1, 1, 0, 1), Error);
}

TEST(KvCache, RefusesSizesWhoseProductOverflows) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 31;
  EXPECT_THROW(HostKvCache(4, 4, 1, kHuge, kHuge), Error);
  EXPECT_THROW(HostKvCache(1, 1, 1, std::int64_t{1} << 62, 1), Error);
}

/// Memory of this process, in MiB.
std::int64_t resident_mebibytes() {
  std::int64_t total = 0;
  std::int64_t resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE) / (1 << 20);
}

TEST(KvCache, TakesNoMemoryForTokensThatItDoesNotHold) {
  const std::int64_t before = resident_mebibytes();
  const HostKvCache cache(1, 1, 1 << 20, 64, 1);  // 512 MiB
  EXPECT_EQ(cache.num_free_slots(), 64);
  EXPECT_LT(resident_mebibytes() - before, 128);
}

}  // namespace
}  // namespace moq::inference
