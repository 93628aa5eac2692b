#include "kernels/rotary.h"

#include <numbers>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels {
namespace {

using test::expect_accurate;
using test::normal_vector;

struct Table {
  std::vector<float> cos;
  std::vector<float> sin;
};

Table make_table(RotaryTableArgs args) {
  const auto size = static_cast<std::size_t>(args.num_positions * args.rotary_dim / 2);
  Table table{std::vector<float>(size), std::vector<float>(size)};
  args.cos = table.cos.data();
  args.sin = table.sin.data();
  cpu::rotary_table(args);
  return table;
}

/// Arguments of a table whose memory make_table gives it.
RotaryTableArgs table_args(float theta, std::int64_t rotary_dim, std::int64_t num_positions) {
  return {.theta = theta,
          .rotary_dim = rotary_dim,
          .num_positions = num_positions,
          .cos = nullptr,
          .sin = nullptr};
}

/// The angle that a table entry stands for, recovered from its sine and cosine at position 1.
double frequency_of(const Table& table, std::int64_t rotary_dim, std::int64_t pair) {
  const std::size_t entry = static_cast<std::size_t>(rotary_dim / 2 + pair);
  return std::atan2(static_cast<double>(table.sin[entry]), static_cast<double>(table.cos[entry]));
}

TEST(RotaryTableTest, HoldsCosinesAndSinesOfPositionTimesFrequency) {
  const Table table = make_table(table_args(10000.0F, 64, 2048));
  for (std::int64_t p = 0; p < 2048; p += 89) {
    for (std::int64_t i = 0; i < 32; ++i) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * i / 64.0);
      // The angle is rounded to float32, twice: half a unit in the last place each.
      const double tolerance = angle * 0x1p-23 + 0x1p-23;
      ASSERT_NEAR(table.cos[p * 32 + i], std::cos(angle), tolerance) << p << " " << i;
      ASSERT_NEAR(table.sin[p * 32 + i], std::sin(angle), tolerance) << p << " " << i;
    }
  }
}

TEST(RotaryTableTest, LinearScalingStretchesPositions) {
  const Table plain = make_table(table_args(500.0F, 10, 9));
  RotaryTableArgs args = table_args(500.0F, 10, 33);
  args.scaling = RotaryScaling::kLinear;
  args.factor = 4.0F;
  const Table scaled = make_table(args);
  for (std::int64_t p = 0; p < 9; ++p) {
    for (std::int64_t i = 0; i < 5; ++i) {
      EXPECT_EQ(scaled.cos[4 * p * 5 + i], plain.cos[p * 5 + i]);
    }
  }
}

TEST(RotaryTableTest, Llama3ScalingKeepsHighFrequenciesAndDividesLowOnes) {
  // The published configuration of Llama 3.2.
  const std::int64_t dim = 64;
  RotaryTableArgs args = table_args(500000.0F, dim, 2);
  args.scaling = RotaryScaling::kLlama3;
  args.factor = 32.0F;
  args.low_frequency_factor = 1.0F;
  args.high_frequency_factor = 4.0F;
  args.original_max_position = 8192.0F;
  const Table table = make_table(args);
  int blended = 0;
  for (std::int64_t i = 0; i < dim / 2; ++i) {
    const double plain = std::pow(500000.0, -2.0 * i / 64.0);
    const double wavelength = 2.0 * std::numbers::pi / plain;
    double expected = plain;
    if (wavelength > 8192.0 / 1.0) {
      expected = plain / 32.0;
    } else if (wavelength >= 8192.0 / 4.0) {
      const double smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
      expected = (1.0 - smooth) * plain / 32.0 + smooth * plain;
      ++blended;
    }
    EXPECT_NEAR(frequency_of(table, dim, i) / expected, 1.0, 1e-6) << i;
  }
  EXPECT_GT(blended, 0);
}

TEST(RotaryTableTest, RefusesParametersOutOfRange) {
  const auto expect_refused = [&](auto change) {
    RotaryTableArgs args = table_args(10000.0F, 4, 0);
    change(args);
    EXPECT_THROW(make_table(args), Error);
  };
  expect_refused([](auto& args) { args.theta = 0.0F; });
  expect_refused([](auto& args) { args.rotary_dim = 3; });
  expect_refused([](auto& args) { args.rotary_dim = 0; });
  expect_refused([](auto& args) { args.scaling = RotaryScaling::kLinear, args.factor = 0.0F; });
  expect_refused([](auto& args) { args.scaling = RotaryScaling::kLlama3; });
}

/// Rows [heads | something else], as q and k lie in a packed qkv row.
struct Case {
  std::int64_t num_tokens;
  std::int64_t num_heads;
  std::int64_t head_dim;
  std::int64_t rotary_dim;
};

class RotaryShape : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr std::int64_t kNumPositions = 512;
  Case shape = GetParam();
  std::int64_t token_stride = shape.num_heads * shape.head_dim + 5;
  Table table = make_table(table_args(10000.0F, shape.rotary_dim, kNumPositions));
  std::vector<float> rows = normal_vector(shape.num_tokens * token_stride, 1);
  std::vector<std::int64_t> positions = [this] {
    std::vector<std::int64_t> result;
    for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
      result.push_back((t * 37 + 11) % kNumPositions);
    }
    return result;
  }();

  RotaryArgs args(std::vector<float>& data) {
    return {.heads = data.data(),
            .num_tokens = shape.num_tokens,
            .num_heads = shape.num_heads,
            .token_stride = token_stride,
            .head_stride = shape.head_dim,
            .rotary_dim = shape.rotary_dim,
            .positions = positions.data(),
            .cos = table.cos.data(),
            .sin = table.sin.data(),
            .num_positions = kNumPositions};
  }

  /// The rotation as complex multiplication, in Number.
  template <typename Number>
  std::vector<Number> reference() const {
    std::vector<Number> result(rows.begin(), rows.end());
    const std::int64_t half = shape.rotary_dim / 2;
    for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
      for (std::int64_t h = 0; h < shape.num_heads; ++h) {
        for (std::int64_t i = 0; i < half; ++i) {
          const std::int64_t low = t * token_stride + h * shape.head_dim + i;
          const std::int64_t entry = positions[t] * half + i;
          const Number c = table.cos[entry];
          const Number s = table.sin[entry];
          result[low] = rows[low] * c - rows[low + half] * s;
          result[low + half] = rows[low] * s + rows[low + half] * c;
        }
      }
    }
    return result;
  }
};

TEST_P(RotaryShape, RotatesPairsAndLeavesTheRest) {
  std::vector<float> rotated = rows;
  cpu::rotary(args(rotated));
  expect_accurate(rotated, reference<float>(), reference<double>());
  const std::vector<double> exact = reference<double>();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (exact[i] == rows[i]) {
      ASSERT_EQ(rotated[i], rows[i]);
    }
  }
}

TEST_P(RotaryShape, GivesTheSameBitsOnSeveralThreads) {
  std::vector<float> alone = rows;
  cpu::rotary(args(alone));
  const ThreadScope threads(3);
  std::vector<float> together = rows;
  cpu::rotary(args(together));
  EXPECT_EQ(alone, together);
}

INSTANTIATE_TEST_SUITE_P(Shapes, RotaryShape,
                         ::testing::Values(Case{1, 1, 2, 2}, Case{3, 5, 7, 6}, Case{7, 12, 64, 64},
                                           Case{2, 3, 96, 24}, Case{300, 12, 64, 64}));

TEST(RotaryTest, PositionOutsideTheTableIsRefusedBeforeAnythingRotates) {
  const Table table = make_table(table_args(10000.0F, 2, 4));
  std::vector<float> rows = {1.0F, 2.0F, 3.0F, 4.0F};
  const std::vector<float> before = rows;
  for (const std::int64_t position : {std::int64_t{-1}, std::int64_t{4}}) {
    const std::vector<std::int64_t> positions = {1, position};
    EXPECT_THROW(cpu::rotary({.heads = rows.data(),
                              .num_tokens = 2,
                              .num_heads = 1,
                              .token_stride = 2,
                              .head_stride = 2,
                              .rotary_dim = 2,
                              .positions = positions.data(),
                              .cos = table.cos.data(),
                              .sin = table.sin.data(),
                              .num_positions = 4}),
                 Error);
    EXPECT_EQ(rows, before);
  }
}

}  // namespace
}  // namespace moq::kernels
