// Collectives through shared memory, each rank a real process.
#include "inference/parallel/shared_memory_group.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <csignal>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/common/check.h"
#include "tests/cpp/error_of.h"
#include "tests/cpp/parallel/fork_ranks.h"

namespace moq::inference {
namespace {

using test::error_of;

constexpr SharedMemoryOptions kDefault{};
constexpr SharedMemoryOptions kSmallChunks{.chunk_bytes = 256, .timeout = std::chrono::minutes(1)};

/// What `rank` contributes: numbers of very different sizes, so that the order of a sum shows in
/// its bits.
std::vector<float> contribution(int rank, std::size_t count, unsigned seed = 0) {
  std::mt19937 generator(seed * 1000 + static_cast<unsigned>(rank));
  std::uniform_real_distribution<float> exponent(-12.0F, 12.0F);
  std::vector<float> values(count);
  for (float& value : values) {
    value = std::exp(exponent(generator)) * (generator() % 2 == 0 ? 1.0F : -1.0F);
  }
  return values;
}

std::vector<float> sum_in_rank_order(int size, std::size_t count, unsigned seed = 0) {
  std::vector<float> sum = contribution(0, count, seed);
  for (int rank = 1; rank < size; ++rank) {
    const std::vector<float> values = contribution(rank, count, seed);
    for (std::size_t i = 0; i < count; ++i) {
      sum[i] += values[i];
    }
  }
  return sum;
}

void expect_same_bits(const std::vector<float>& got, const std::vector<float>& expected) {
  const auto same = [](float a, float b) {
    return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
  };
  MOQ_CHECK(std::equal(got.begin(), got.end(), expected.begin(), expected.end(), same),
            "the values must have the expected bits, got others");
}

void expect_success(const std::vector<RankResult>& results) {
  for (std::size_t rank = 0; rank < results.size(); ++rank) {
    EXPECT_EQ(results[rank].error, "") << "rank " << rank;
    EXPECT_EQ(results[rank].exit_status, 0) << "rank " << rank;
    EXPECT_EQ(results[rank].signal, 0) << "rank " << rank;
  }
}

struct MessageCase {
  int size;
  std::size_t count;  ///< floats
};

class Messages : public testing::TestWithParam<MessageCase> {};

TEST_P(Messages, SumsHaveTheBitsOfTheSumInRankOrderOnEveryRank) {
  const auto [size, count] = GetParam();
  const std::vector<float> expected = sum_in_rank_order(size, count);
  expect_success(fork_ranks(size, kDefault, [&](SharedMemoryGroup& group) {
    std::vector<float> values = contribution(group.rank(), count);
    group.all_reduce_sum(values);
    expect_same_bits(values, expected);
  }));
}

TEST_P(Messages, BroadcastCopiesTheBytesOfTheRoot) {
  const auto [size, count] = GetParam();
  expect_success(fork_ranks(size, kDefault, [&](SharedMemoryGroup& group) {
    for (int root = 0; root < group.size(); ++root) {
      std::vector<float> values = contribution(group.rank(), count);
      group.broadcast(std::as_writable_bytes(std::span(values)), root);
      expect_same_bits(values, contribution(root, count));
    }
  }));
}

// 65,536 floats are one chunk of the default size; 2,621,441 are 10 MiB and one float.
INSTANTIATE_TEST_SUITE_P(
    RanksAndSizes, Messages,
    testing::Values(MessageCase{1, 97}, MessageCase{2, 0}, MessageCase{2, 1}, MessageCase{2, 97},
                    MessageCase{2, 576}, MessageCase{2, 65536}, MessageCase{2, 65537},
                    MessageCase{2, 2621441}, MessageCase{3, 0}, MessageCase{3, 1},
                    MessageCase{3, 97}, MessageCase{3, 2048}, MessageCase{3, 131101},
                    MessageCase{4, 1}, MessageCase{4, 4099}, MessageCase{4, 2621441}),
    [](const auto& info) {
      return std::to_string(info.param.size) + "_ranks_" + std::to_string(info.param.count) +
             "_floats";
    });

class Ranks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, Ranks, testing::Values(2, 3, 4));

TEST_P(Ranks, StayInStepOverThousandsOfMixedCollectives) {
  const int size = GetParam();
  expect_success(fork_ranks(size, kSmallChunks, [&](SharedMemoryGroup& group) {
    for (unsigned round = 0; round < 3000; ++round) {
      const std::size_t count = round % 150;  // from nothing to three chunks
      std::vector<float> values(count, static_cast<float>(group.rank() + 1) + round % 7);
      switch (round % 4) {
        case 0:
        case 1: {
          group.all_reduce_sum(values);
          const float ranks = static_cast<float>(size);
          const float expected = ranks * (ranks + 1) / 2 + ranks * (round % 7);
          expect_same_bits(values, std::vector<float>(count, expected));
          break;
        }
        case 2: {
          const int root = static_cast<int>(round) % size;
          group.broadcast(std::as_writable_bytes(std::span(values)), root);
          expect_same_bits(values,
                           std::vector<float>(count, static_cast<float>(root + 1) + round % 7));
          break;
        }
        default:
          group.barrier();
      }
    }
  }));
}

TEST_P(Ranks, MaximumIsElementwiseAndKeepsNan) {
  expect_success(fork_ranks(GetParam(), kDefault, [&](SharedMemoryGroup& group) {
    const float rank = static_cast<float>(group.rank());
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> values = {rank, -rank, group.rank() == 1 ? nan : 7.0F};
    group.all_reduce_max(values);
    MOQ_CHECK(values[0] == static_cast<float>(group.size() - 1) && values[1] == 0.0F &&
                  std::isnan(values[2]),
              "the maximum must be (size - 1, 0, NaN), got ", values[0], ", ", values[1], ", ",
              values[2]);
  }));
}

TEST_P(Ranks, LeaveTheBarrierOnlyWhenAllHaveComeToIt) {
  using Clock = std::chrono::steady_clock;  // one clock for all processes of the host
  expect_success(fork_ranks(GetParam(), kDefault, [](SharedMemoryGroup& group) {
    const int last = group.size() - 1;
    if (group.rank() == last) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    Clock::time_point last_came = Clock::now();
    group.barrier();
    const Clock::time_point left = Clock::now();
    group.broadcast(std::as_writable_bytes(std::span(&last_came, 1)), last);
    MOQ_CHECK(left >= last_came, "a rank must not leave before the last has come, got rank ",
              group.rank(), " leaving ", (last_came - left).count(), " ns earlier");
  }));
}

TEST_P(Ranks, AreWokenByTheAnnouncementTheySleepFor) {
  using Clock = std::chrono::steady_clock;
  expect_success(fork_ranks(GetParam(), kDefault, [](SharedMemoryGroup& group) {
    constexpr int kRounds = 21;
    std::vector<Clock::duration> delays;
    for (int round = 0; round < kRounds; ++round) {
      if (group.rank() == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than any spinning
      }
      Clock::time_point came = Clock::now();
      group.barrier();
      const Clock::time_point left = Clock::now();
      group.broadcast(std::as_writable_bytes(std::span(&came, 1)), 0);
      delays.push_back(left - came);
    }
    // Without the wake a sleeper looks around by itself every 20 ms: 10 ms of delay in the median,
    // which rounds that other load delays do not move.
    std::nth_element(delays.begin(), delays.begin() + kRounds / 2, delays.end());
    const Clock::duration median = delays[kRounds / 2];
    MOQ_CHECK(group.rank() == 0 || median < std::chrono::milliseconds(5),
              "a sleeper must be woken by the announcement, got a delay of ", median.count(),
              " ns in the median");
  }));
}

TEST_P(Ranks, MayLeaveRightAfterTheLastCollective) {
  for (int repetition = 0; repetition < 20; ++repetition) {
    expect_success(fork_ranks(GetParam(), kDefault, [](SharedMemoryGroup& group) {
      std::vector<float> values(5, 1.0F);
      group.all_reduce_sum(values);
    }));
  }
}

struct GatherCase {
  std::int64_t rows;
  std::vector<std::int64_t> widths;
};

class GatherColumns : public testing::TestWithParam<GatherCase> {};

TEST_P(GatherColumns, PutsUnevenShardsSideBySideInRankOrder) {
  const auto& [rows, widths] = GetParam();
  // kSmallChunks holds 64 floats: several rows of a chunk, one row, or a part of a row.
  expect_success(fork_ranks(static_cast<int>(widths.size()), kSmallChunks, [&](auto& group) {
    const auto element = [](std::int64_t row, std::int64_t column) {
      return static_cast<float>(row * 1000 + column);
    };
    std::int64_t first = 0;
    for (int rank = 0; rank < group.rank(); ++rank) {
      first += widths[static_cast<std::size_t>(rank)];
    }
    const std::int64_t width = widths[static_cast<std::size_t>(group.rank())];
    std::vector<float> shard;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < width; ++column) {
        shard.push_back(element(row, first + column));
      }
    }
    std::int64_t total = 0;
    for (const std::int64_t each : widths) {
      total += each;
    }
    std::vector<float> expected;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < total; ++column) {
        expected.push_back(element(row, column));
      }
    }
    std::vector<float> output(expected.size());
    group.all_gather_columns(shard.data(), rows, widths, output.data());
    expect_same_bits(output, expected);
  }));
}

INSTANTIATE_TEST_SUITE_P(Shapes, GatherColumns,
                         testing::Values(GatherCase{1, {1, 1}}, GatherCase{7, {5, 3}},
                                         GatherCase{29, {6, 3}}, GatherCase{3, {64, 32, 32}},
                                         GatherCase{5, {0, 17, 101}}, GatherCase{2, {193, 64}},
                                         GatherCase{0, {4, 4}}, GatherCase{3, {0, 0}},
                                         GatherCase{4, {3, 2, 2, 2}}));

// ------------------------------------------------------------------------------------------------
// failures

/// A message without the operation that it begins with.
std::string after_colon(const std::string& message) {
  return message.substr(message.find(": ") + 2);
}

class Failures : public testing::TestWithParam<int> {
 protected:
  /// Every rank reduces forever; rank 1 calls `stop` in the 100th round. Expects the error on all
  /// other ranks, soon.
  void expect_named(const std::function<void()>& stop, const std::string& reason) {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<RankResult> results =
        fork_ranks(GetParam(), kDefault, [&](SharedMemoryGroup& group) {
          std::vector<float> values(1000, 0.0F);
          for (int round = 0;; ++round) {
            if (group.rank() == 1 && round == 100) {
              stop();
            }
            group.all_reduce_sum(values);
          }
        });
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
    const std::string expected =
        "all_reduce_sum: every rank must take part, got no rank 1 (process " +
        std::to_string(results[1].process) + ") of " + std::to_string(GetParam()) + ": " + reason +
        "; its own output says why";
    for (std::size_t rank = 0; rank < results.size(); ++rank) {
      if (rank != 1) {
        EXPECT_EQ(results[rank].error, expected) << "rank " << rank;
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Sizes, Failures, testing::Values(2, 3, 4));

TEST_P(Failures, AKilledRankIsNamedOnAllOthers) {
  expect_named([] { raise(SIGKILL); }, "its process has ended");
}

TEST_P(Failures, ARankThatExitsIsNamedOnAllOthers) {
  expect_named([] { _exit(0); }, "its process has ended");
}

TEST_P(Failures, ARankThatGivesUpIsNamedOnAllOthers) {
  expect_named([] { throw std::runtime_error("no more"); }, "it has left the group");
}

TEST(Timeout, NamesTheRankThatDoesNotCome) {
  const SharedMemoryOptions impatient{.timeout = std::chrono::milliseconds(100)};
  const std::vector<RankResult> results = fork_ranks(2, impatient, [](SharedMemoryGroup& group) {
    group.barrier();
    if (group.rank() == 0) {
      group.barrier();
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(400));
      group.barrier();
    }
  });
  const std::string expected = "barrier: every rank must take part, got no rank 1 (process " +
                               std::to_string(results[1].process) +
                               ") of 2: it did not come within 100 ms; its own output says why";
  EXPECT_EQ(results[0].error, expected);
  EXPECT_EQ(results[1].error, expected);
}

/// Calls that rank 0 and the last rank make at the same time, and how the error names them.
struct Divergence {
  const char* name;
  std::function<void(SharedMemoryGroup&)> first;
  std::function<void(SharedMemoryGroup&)> last;
  const char* first_call;
  const char* last_call;
};

void PrintTo(const Divergence& divergence, std::ostream* out) {
  *out << divergence.name;
}

template <int kCount>
void sum(SharedMemoryGroup& group) {
  std::vector<float> values(kCount, 1.0F);
  group.all_reduce_sum(values);
}

void maximum(SharedMemoryGroup& group) {
  std::vector<float> values(576, 1.0F);
  group.all_reduce_max(values);
}

template <int kRoot>
void broadcast(SharedMemoryGroup& group) {
  std::vector<std::byte> bytes(8);
  group.broadcast(bytes, kRoot);
}

template <int kRows>
void gather(SharedMemoryGroup& group) {
  std::vector<std::int64_t> widths(static_cast<std::size_t>(group.size()), 6 / kRows);
  const std::vector<float> shard(6);
  std::vector<float> output(6 * widths.size());
  group.all_gather_columns(shard.data(), kRows, widths, output.data());
}

class Diverging : public testing::TestWithParam<Divergence> {};

TEST_P(Diverging, CallsAreAnErrorOnEveryRank) {
  const auto& [name, first, last, first_call, last_call] = GetParam();
  for (const int size : {2, 3}) {
    const std::vector<RankResult> results =
        fork_ranks(size, kSmallChunks, [&](SharedMemoryGroup& group) {
          group.barrier();
          const auto& call = group.rank() == size - 1 ? last : first;
          try {
            call(group);
          } catch (const Error& error) {
            // The group stays of no use, and says so in the same words.
            MOQ_CHECK(error_of([&] { group.barrier(); }).ends_with(after_colon(error.what())),
                      "a later call must throw the same, got another error");
            throw;
          }
        });
    const std::string expected =
        "all " + std::to_string(size) + " ranks must make the same calls in the same order, got " +
        first_call + " on rank 0 and " + last_call + " on rank " + std::to_string(size - 1);
    for (const RankResult& result : results) {
      EXPECT_EQ(after_colon(result.error), expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, Diverging,
    testing::Values(Divergence{"Sizes", sum<576>, sum<1152>, "all_reduce_sum of 2304 bytes",
                               "all_reduce_sum of 4608 bytes"},
                    Divergence{"Operations", sum<576>, maximum, "all_reduce_sum of 2304 bytes",
                               "all_reduce_max of 2304 bytes"},
                    Divergence{"NothingAndSomething", sum<0>, sum<4>, "all_reduce_sum of 0 bytes",
                               "all_reduce_sum of 16 bytes"},
                    Divergence{"Roots", broadcast<0>, broadcast<1>,
                               "broadcast of 8 bytes from rank 0",
                               "broadcast of 8 bytes from rank 1"},
                    Divergence{"BarrierAndSum", [](SharedMemoryGroup& group) { group.barrier(); },
                               sum<1>, "barrier", "all_reduce_sum of 4 bytes"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(DivergingGathers, NameTheRows) {
  const std::vector<RankResult> results = fork_ranks(2, kDefault, [](SharedMemoryGroup& group) {
    group.rank() == 0 ? gather<2>(group) : gather<3>(group);
  });
  for (const RankResult& result : results) {
    EXPECT_TRUE(
        result.error.ends_with("got all_gather_columns of 48 bytes in 2 rows on rank 0 and "
                               "all_gather_columns of 48 bytes in 3 rows on rank 1"))
        << result.error;
  }
}

TEST(Broadcast, RefusesARootOutsideTheGroup) {
  const std::vector<RankResult> results =
      fork_ranks(2, kDefault, [](SharedMemoryGroup& group) { group.broadcast({}, 2); });
  EXPECT_EQ(results[0].error, "broadcast: root must be in [0, 2), got 2");
}

TEST(GatherColumnsErrors, RefuseWidthsThatAreNotOnePerRank) {
  const std::vector<RankResult> results = fork_ranks(2, kDefault, [](SharedMemoryGroup& group) {
    const std::vector<std::int64_t> widths = {1, 1, 1};
    group.all_gather_columns(nullptr, 0, widths, nullptr);
  });
  EXPECT_EQ(
      results[0].error,
      "all_gather_columns: widths must be one number >= 0 per rank, got 3 numbers for 2 ranks");
}

TEST(Options, RefuseAChunkThatIsNoMultipleOfACacheLine) {
  EXPECT_THROW(SharedMemoryGroup::bytes_needed(2, {.chunk_bytes = 100}), Error);
  EXPECT_THROW(SharedMemoryGroup::bytes_needed(2, {.chunk_bytes = 0}), Error);
  EXPECT_THROW(SharedMemoryGroup::bytes_needed(0, {}), Error);
}

}  // namespace
}  // namespace moq::inference
