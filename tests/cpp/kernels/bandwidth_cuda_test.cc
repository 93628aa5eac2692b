#include <algorithm>
#include <random>

#include "kernels/cuda/bandwidth.h"
#include "tests/cpp/kernels/device.h"

namespace moq::kernels::cuda {
namespace {

using testing::Buffer;

class ReadSizeCuda : public ::testing::TestWithParam<std::int64_t> {};

TEST_P(ReadSizeCuda, ReadsEveryWord) {
  MOQ_SKIP_WITHOUT_GPU();
  std::vector<std::uint64_t> words(static_cast<std::size_t>(GetParam()));
  std::mt19937_64 generator(1);
  std::uint64_t expected = 0;
  for (std::uint64_t& word : words) {
    word = generator();
    expected ^= word;
  }
  const Buffer buffer(words);
  for (const bool bulk : {false, true}) {
    std::vector<std::uint64_t> found(1);
    const Buffer sum(found);
    read(buffer.data(), words.size() * sizeof(words[0]), bulk, sum.as<std::uint64_t>(), nullptr);
    sum.copy_to(found);
    EXPECT_EQ(found[0], expected) << (bulk ? "bulk copies" : "plain loads");
  }
}

TEST_P(ReadSizeCuda, AddsUpWhatReadingsThatOverlapFind) {
  MOQ_SKIP_WITHOUT_GPU();
  std::vector<std::uint64_t> words(static_cast<std::size_t>(GetParam()), 0);
  words.back() = 0x9e3779b97f4a7c15U;
  const Buffer buffer(words);
  std::vector<std::uint64_t> found(1);
  const Buffer sum(found);
  // An odd number: every second reading takes back what the one before has added.
  const int readings = std::max(testing::repeats(51), 3) | 1;
  for (int i = 0; i < readings; ++i) {
    read(buffer.data(), words.size() * sizeof(words[0]), i % 2 == 0, sum.as<std::uint64_t>(),
         nullptr);
  }
  sum.copy_to(found);
  EXPECT_EQ(found[0], words.back());
}

INSTANTIATE_TEST_SUITE_P(Words, ReadSizeCuda,
                         ::testing::Values(2, 62, 2048, 2050, 4094, 1'000'002, 20'000'000));

TEST(BandwidthCuda, RefusesPartialPairsAndNothing) {
  MOQ_SKIP_WITHOUT_GPU();
  const Buffer buffer(32);
  auto* sum = buffer.as<std::uint64_t>();
  EXPECT_THROW(read(buffer.data(), 0, false, sum, nullptr), Error);
  EXPECT_THROW(read(buffer.data(), 24, false, sum, nullptr), Error);
  EXPECT_THROW(read(buffer.as<char>() + 8, 16, true, sum, nullptr), Error);
  EXPECT_THROW(read(buffer.data(), 16, true, nullptr, nullptr), Error);
}

}  // namespace
}  // namespace moq::kernels::cuda
