#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <vector>

namespace moq::kernels {
namespace {

TEST(Linear, MultipliesByScaledCodes) {
  const std::vector<std::int8_t> codes = {1, -2, 3, 4, 5, -6};  // [2, 3]
  const std::vector<float> scales = {0.5F, 2.0F};
  const LinearShape shape{.n = 2, .k = 3, .format = WeightFormat::kInt8, .group_size = 3};
  alignas(64) std::byte packed[4096];
  ASSERT_LE(cpu::packed_linear_size(shape), sizeof packed);
  cpu::pack_linear({.shape = shape,
                    .weight = codes.data(),
                    .row_stride = 3,
                    .col_stride = 1,
                    .scales = scales.data(),
                    .packed = packed});
  const std::vector<float> input = {1.0F, 10.0F, 100.0F};
  std::vector<float> output(2);
  cpu::linear({.input = input.data(),
               .m = 1,
               .input_stride = 3,
               .weight = {.shape = shape, .data = packed},
               .output = output.data(),
               .output_stride = 2});
  EXPECT_EQ(output[0], 140.5F);
  EXPECT_EQ(output[1], -1092.0F);
}

}  // namespace
}  // namespace moq::kernels
