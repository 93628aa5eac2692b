// What pack_weights hands to a packer, whatever the number of threads that read it.
#include "inference/engine/packed_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/inference/crafted_checkpoint.h"

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::error_of;
using kernels::WeightFormat;

constexpr std::int64_t kRows = 301;  // read in several chunks
constexpr std::int64_t kCols = 48;
constexpr Range kAllCols{0, kCols};

float number(std::int64_t row, std::int64_t col) {
  return static_cast<float>((row * 37 + col * 11) % 251 - 125) / 8.0F;
}

/// Two matrices of those numbers, "first" and "second", whose rows follow each other's.
class PackWeights : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    std::vector<std::uint16_t> halves;
    std::vector<float> floats;
    for (std::int64_t row = 0; row < 2 * kRows; ++row) {
      for (std::int64_t col = 0; col < kCols; ++col) {
        if (row < kRows) {
          halves.push_back(float_to_float16(number(row, col)));
        } else {
          floats.push_back(number(row, col));
        }
      }
    }
    files_.set("first.weight", "F16", {kRows, kCols}, halves);
    files_.set("second.weight", "F32", {kRows, kCols}, floats);
  }

  /// Rows [100, kRows) of the first and [0, 150) of the second matrix.
  UnpackedWeight unpacked(Range cols, bool quantize, std::optional<WeightFormat> floats,
                          const std::vector<std::int64_t>& order = {}) {
    const kernels::ThreadScope threads(GetParam());
    const Checkpoint open = files_.open();
    const auto first = WeightSource::find(open, "first", WeightLayout::kOutIn);
    const auto second = WeightSource::find(open, "second", WeightLayout::kOutIn);
    const std::vector<RowSlice> slices = {{&*first, {100, kRows}, nullptr},
                                          {&*second, {0, 150}, nullptr}};
    UnpackedWeight found;
    const QuantizationConfig none =
        QuantizationConfig::parse(checkpoint::Json::parse("{}", "config.json"));
    pack_weights(open, slices, cols, order,
                 {.quantization = none,
                  .floats = floats,
                  .quantize = quantize,
                  .pack = [&](const UnpackedWeight& weight) {
                    found = weight;
                    return pack_for_cpu(weight);
                  }});
    return found;
  }
  static constexpr std::int64_t kAllRows = kRows - 100 + 150;

  /// The number at row `row` of the slices.
  static float expected(std::int64_t row, std::int64_t col) { return number(row + 100, col); }

  CraftedCheckpoint files_;
};

TEST_P(PackWeights, PutsRowsOfFloatsOneBelowTheOther) {
  const Range cols{5, 37};
  const UnpackedWeight weight = unpacked(cols, false, WeightFormat::kFloat16);
  ASSERT_EQ(weight.shape.n, kAllRows);
  ASSERT_EQ(weight.rows.size(), static_cast<std::size_t>(kAllRows * cols.size() * 2));
  for (std::int64_t row = 0; row < kAllRows; ++row) {
    for (std::int64_t col = 0; col < cols.size(); ++col) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, weight.rows.data() + (row * cols.size() + col) * 2, sizeof(bits));
      ASSERT_EQ(float16_to_float(bits), expected(row, cols.begin + col)) << row << ", " << col;
    }
  }
}

TEST_P(PackWeights, QuantizesRowsByTheLargestNumberOfTheWholeRow) {
  const Range cols{16, 40};
  std::vector<std::int64_t> order(kAllRows);
  std::iota(order.rbegin(), order.rend(), 0);  // upside down
  const UnpackedWeight codes = unpacked(cols, true, std::nullopt, order);
  ASSERT_EQ(codes.shape.format, WeightFormat::kInt8);
  ASSERT_EQ(codes.scales.size(), static_cast<std::size_t>(kAllRows));
  for (std::int64_t i = 0; i < kAllRows; ++i) {
    const std::int64_t row = kAllRows - 1 - i;
    float largest = 0.0F;
    for (std::int64_t col = 0; col < kCols; ++col) {
      largest = std::max(largest, std::fabs(expected(row, col)));
    }
    const float scale = codes.scales[static_cast<std::size_t>(i)];
    ASSERT_NEAR(scale, largest / 127.0F, 1e-6F * largest) << row;
    for (std::int64_t col = 0; col < cols.size(); ++col) {
      const auto code = static_cast<std::int8_t>(codes.rows[i * cols.size() + col]);
      ASSERT_NEAR(static_cast<float>(code) * scale, expected(row, cols.begin + col),
                  0.5001F * scale);
    }
  }
}

TEST_P(PackWeights, NamesTheMatrixThatHoldsANan) {
  std::vector<float> floats(kRows * kCols, 1.0F);
  floats[140 * kCols + 7] = std::numeric_limits<float>::quiet_NaN();
  files_.set("second.weight", "F32", {kRows, kCols}, floats);
  const std::string message = error_of([&] { unpacked(kAllCols, true, std::nullopt); });
  EXPECT_NE(message.find("second.weight must hold finite numbers"), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(Threads, PackWeights, testing::Values(1, 4));

}  // namespace
}  // namespace moq::inference
