#include "kernels/common/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/common/check.h"
#include "tests/cpp/kernels/child.h"

namespace moq::kernels {
namespace {

using testing::status_of_child;

/// How often parallel_for visits each number.
std::vector<int> visits(std::int64_t size, std::int64_t grain) {
  std::vector<int> count(size, 0);
  parallel_for(size, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      ++count[i];
    }
  });
  return count;
}

struct Case {
  int threads;
  std::int64_t size;
  std::int64_t grain;
};

class ParallelFor : public ::testing::TestWithParam<Case> {};

TEST_P(ParallelFor, VisitsEveryNumberOnce) {
  const ThreadScope scope(GetParam().threads);
  EXPECT_EQ(visits(GetParam().size, GetParam().grain), std::vector<int>(GetParam().size, 1));
}

TEST_P(ParallelFor, GivesWholeGrainsButForTheLastRange) {
  const ThreadScope scope(GetParam().threads);
  const auto [threads, size, grain] = GetParam();
  std::atomic<int> broken = 0;
  parallel_for(size, grain, [&, size = size, grain = grain](std::int64_t begin, std::int64_t end) {
    if (begin % grain != 0 || (end % grain != 0 && end != size)) {
      ++broken;
    }
  });
  EXPECT_EQ(broken, 0);
}

INSTANTIATE_TEST_SUITE_P(Sizes, ParallelFor,
                         ::testing::Values(Case{1, 10, 3}, Case{2, 0, 1}, Case{2, 1, 1},
                                           Case{2, 7, 2}, Case{2, 10007, 64}, Case{3, 10, 100},
                                           Case{4, 5, 1}, Case{7, 1000, 1}));

TEST(Parallel, UsesOneThreadWithoutAScope) {
  EXPECT_EQ(num_threads(), 1);
  const auto caller = std::this_thread::get_id();
  parallel_for(100, 1,
               [&](std::int64_t, std::int64_t) { EXPECT_EQ(std::this_thread::get_id(), caller); });
}

TEST(Parallel, RestoresTheLimitWhenAScopeEnds) {
  const ThreadScope outer(3);
  {
    const ThreadScope inner(2);
    EXPECT_EQ(num_threads(), 2);
  }
  EXPECT_EQ(num_threads(), 3);
}

TEST(Parallel, RunsRangesOnSeveralThreadsAtOnce) {
  const ThreadScope scope(2);
  std::atomic<int> inside = 0;
  // Each of the two ranges waits for the other: one thread alone would never finish.
  parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
    ++inside;
    while (inside < 2) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(inside, 2);
}

TEST(Parallel, WakesWorkersThatHaveGoneToSleep) {
  const ThreadScope scope(2);
  for (int round = 0; round < 3; ++round) {
    std::atomic<int> inside = 0;
    parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
      ++inside;
      while (inside < 2) {
        std::this_thread::yield();
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

TEST(Parallel, RethrowsTheExceptionOfABody) {
  const ThreadScope scope(3);
  for (int round = 0; round < 100; ++round) {
    EXPECT_THROW(parallel_for(64, 1,
                              [](std::int64_t begin, std::int64_t end) {
                                if (begin <= 32 && 32 < end) {
                                  throw std::out_of_range("body");
                                }
                              }),
                 std::out_of_range);
  }
  EXPECT_EQ(visits(64, 1), std::vector<int>(64, 1)) << "the pool works on after an exception";
}

TEST(Parallel, KeepsOneOfManyExceptions) {
  const ThreadScope scope(4);
  EXPECT_THROW(
      parallel_for(64, 1, [](std::int64_t, std::int64_t) { throw std::runtime_error("body"); }),
      std::runtime_error);
}

TEST(Parallel, RunsANestedCallOnTheThreadThatMakesIt) {
  const ThreadScope scope(2);
  std::atomic<int> strayed = 0;
  std::atomic<int> total = 0;
  parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
    EXPECT_EQ(num_threads(), 1);
    const auto caller = std::this_thread::get_id();
    for (std::int64_t i = begin; i < end; ++i) {
      parallel_for(10, 1, [&](std::int64_t inner_begin, std::int64_t inner_end) {
        strayed += std::this_thread::get_id() != caller ? 1 : 0;
        total += static_cast<int>(inner_end - inner_begin);
      });
    }
  });
  EXPECT_EQ(strayed, 0);
  EXPECT_EQ(total, 80);
  EXPECT_EQ(num_threads(), 2);
}

TEST(Parallel, ServesSeveralCallersAtOnce) {
  std::vector<std::int64_t> sums(4, 0);
  std::vector<std::thread> callers;
  for (std::int64_t& sum : sums) {
    callers.emplace_back([&sum] {
      const ThreadScope scope(3);
      for (int round = 0; round < 500; ++round) {
        std::atomic<std::int64_t> part = 0;
        parallel_for(100, 7, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) {
            part += i;
          }
        });
        sum += part;
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  EXPECT_EQ(sums, std::vector<std::int64_t>(4, 500 * 4950));
}

TEST(Parallel, WorksInAForkedChild) {
  const ThreadScope scope(2);
  visits(100, 1);
  EXPECT_EQ(status_of_child([] { return visits(1000, 1) == std::vector<int>(1000, 1); }), 0);
  EXPECT_EQ(visits(100, 1), std::vector<int>(100, 1)) << "and in the parent after it";
}

TEST(Parallel, WorksInAChildForkedWhileOtherThreadsUseThePool) {
  std::atomic<bool> stop = false;
  std::thread busy([&] {
    const ThreadScope scope(3);
    while (!stop) {
      visits(100, 1);
    }
  });
  const ThreadScope scope(2);
  for (int round = 0; round < 10; ++round) {
    EXPECT_EQ(status_of_child([] { return visits(1000, 1) == std::vector<int>(1000, 1); }), 0);
  }
  stop = true;
  busy.join();
}

TEST(Parallel, RefusesAGrainBelowOne) {
  EXPECT_THROW(parallel_for(1, 0, [](std::int64_t, std::int64_t) {}), Error);
}

TEST(Parallel, RefusesAScopeWithoutThreads) {
  EXPECT_THROW(ThreadScope scope(0), Error);
}

}  // namespace
}  // namespace moq::kernels
