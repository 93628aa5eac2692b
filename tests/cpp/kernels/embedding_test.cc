#include "kernels/embedding.h"

#include <string>

#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "kernels/common/parallel.h"
#include "tests/cpp/kernels/float_support.h"

namespace moq::kernels {
namespace {

using test::normal_vector;

/// A table in its storage, and the real numbers that it stands for.
struct StoredTable {
  std::vector<std::byte> data;
  std::vector<float> scales;
  std::vector<std::int32_t> zero_points;
  std::vector<float> values;
  EmbeddingTable view;
};

StoredTable make_table(DType dtype, std::int64_t num_rows, std::int64_t hidden_size,
                       std::int64_t group_size, unsigned seed) {
  StoredTable table;
  const std::vector<float> numbers = normal_vector(num_rows * hidden_size, seed);
  table.data.resize(numbers.size() * size_of(dtype));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (dtype == DType::kFloat32) {
      reinterpret_cast<float*>(table.data.data())[i] = numbers[i];
      table.values.push_back(numbers[i]);
    } else if (dtype == DType::kInt8) {
      const auto code = static_cast<std::int8_t>(std::clamp(numbers[i] * 40.0F, -127.0F, 127.0F));
      reinterpret_cast<std::int8_t*>(table.data.data())[i] = code;
      if (i % group_size == 0) {
        table.scales.push_back(0.01F * static_cast<float>(1 + i % 7));
        table.zero_points.push_back(static_cast<std::int32_t>(i % 11) - 5);
      }
      table.values.push_back(static_cast<float>(code - table.zero_points.back()) *
                             table.scales.back());
    } else {
      const std::uint16_t bits =
          dtype == DType::kFloat16 ? float_to_float16(numbers[i]) : float_to_bfloat16(numbers[i]);
      reinterpret_cast<std::uint16_t*>(table.data.data())[i] = bits;
      table.values.push_back(round_to(numbers[i], dtype));
    }
  }
  table.view = {.data = table.data.data(),
                .dtype = dtype,
                .scales = dtype == DType::kInt8 ? table.scales.data() : nullptr,
                .zero_points = dtype == DType::kInt8 ? table.zero_points.data() : nullptr,
                .group_size = group_size,
                .num_rows = num_rows};
  return table;
}

std::vector<float> embed(const std::vector<EmbeddingLookup>& lookups, std::int64_t num_tokens,
                         std::int64_t hidden_size) {
  std::vector<float> output(static_cast<std::size_t>(num_tokens * hidden_size), -1.0F);
  cpu::embedding({.lookups = lookups,
                  .output = output.data(),
                  .num_tokens = num_tokens,
                  .hidden_size = hidden_size});
  return output;
}

class EmbeddingDtype
    : public ::testing::TestWithParam<std::tuple<DType, std::pair<std::int64_t, std::int64_t>>> {};

TEST_P(EmbeddingDtype, GathersTheRowsOfItsTokens) {
  const auto [dtype, sizes] = GetParam();
  const auto [hidden_size, group_size] = sizes;
  const StoredTable table = make_table(dtype, 29, hidden_size, group_size, 1);
  const std::vector<std::int64_t> tokens = {28, 0, 7, 7, 13};
  const std::vector<float> output = embed({{table.view, tokens.data()}}, 5, hidden_size);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    for (std::int64_t j = 0; j < hidden_size; ++j) {
      ASSERT_EQ(output[t * hidden_size + j], table.values[tokens[t] * hidden_size + j]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, EmbeddingDtype,
                         ::testing::Combine(::testing::Values(DType::kFloat32, DType::kFloat16,
                                                              DType::kBFloat16, DType::kInt8),
                                            ::testing::Values(std::pair{1, 1}, std::pair{7, 7},
                                                              std::pair{36, 12},
                                                              std::pair{576, 576})),
                         [](const auto& info) {
                           return std::string(name_of(std::get<0>(info.param))) + "_" +
                                  std::to_string(std::get<1>(info.param).first);
                         });

TEST(EmbeddingTest, AddsTablesInTheOrderGiven) {
  const StoredTable tokens = make_table(DType::kInt8, 11, 24, 24, 1);
  const StoredTable types = make_table(DType::kFloat32, 2, 24, 24, 2);
  const StoredTable positions = make_table(DType::kFloat16, 5, 24, 24, 3);
  const std::vector<std::int64_t> token_rows = {3, 10, 0};
  const std::vector<std::int64_t> type_rows = {1, 0, 1};
  const std::vector<std::int64_t> position_rows = {0, 1, 2};
  const ThreadScope threads(2);
  const std::vector<float> output = embed({{tokens.view, token_rows.data()},
                                           {types.view, type_rows.data()},
                                           {positions.view, position_rows.data()}},
                                          3, 24);
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t j = 0; j < 24; ++j) {
      ASSERT_EQ(output[t * 24 + j],
                (tokens.values[token_rows[t] * 24 + j] + types.values[type_rows[t] * 24 + j]) +
                    positions.values[position_rows[t] * 24 + j]);
    }
  }
}

TEST(EmbeddingTest, RefusesWhatItsContractExcludesBeforeItWrites) {
  const StoredTable table = make_table(DType::kInt8, 4, 6, 6, 5);
  const std::vector<std::int64_t> good = {0, 3};
  std::vector<float> output(12, -1.0F);
  const auto expect_refused = [&](EmbeddingTable view, const std::vector<std::int64_t>& rows) {
    const EmbeddingLookup lookup{view, rows.data()};
    EXPECT_THROW(
        cpu::embedding(
            {.lookups = {&lookup, 1}, .output = output.data(), .num_tokens = 2, .hidden_size = 6}),
        Error);
  };
  expect_refused(table.view, {0, 4});
  expect_refused(table.view, {0, -1});
  EmbeddingTable view = table.view;
  view.scales = nullptr;
  expect_refused(view, good);
  view = table.view;
  view.group_size = 4;
  expect_refused(view, good);
  view = table.view;
  view.dtype = DType::kInt32;
  expect_refused(view, good);
  EXPECT_EQ(output, std::vector<float>(12, -1.0F));
  EXPECT_THROW(embed({}, 1, 6), Error);
}

}  // namespace
}  // namespace moq::kernels
