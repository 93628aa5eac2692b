#include "kernels/cpu/bandwidth.h"

#include <cstring>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels::cpu {
namespace {

class ReadSize : public ::testing::TestWithParam<std::int64_t> {};

TEST_P(ReadSize, ReadsEveryWordWithAnyNumberOfThreads) {
  std::vector<std::uint64_t> words(static_cast<std::size_t>(GetParam()));
  std::mt19937_64 generator(1);
  std::uint64_t expected = 0;
  for (std::uint64_t& word : words) {
    word = generator();
    expected ^= word;
  }
  for (const int num_threads : {1, 2, 3}) {
    const ThreadScope threads(num_threads);
    for (const bool prefetch : {false, true}) {
      const ReadMeasurement read = measure_read(std::as_bytes(std::span(words)), prefetch);
      EXPECT_EQ(read.exclusive_or, expected);
      EXPECT_GT(read.bytes_per_second, 0.0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Words, ReadSize, ::testing::Values(1, 7, 64, 4099, 100003));

TEST(BandwidthTest, RefusesPartialWordsAndNothing) {
  const std::vector<std::byte> bytes(12);
  EXPECT_THROW(measure_read(bytes, false), Error);
  EXPECT_THROW(measure_read({}, false), Error);
}

}  // namespace
}  // namespace moq::kernels::cpu
