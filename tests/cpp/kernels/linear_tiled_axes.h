#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <tuple>

#include "kernels/linear.h"

/// What kernels that multiply by tiles are tested over.
namespace moq::kernels::testing {

struct TiledShape {
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  std::int64_t group_size = 0;
};

/// Shape, weight format, dtype of the activations, zero points.
using TiledCase = std::tuple<TiledShape, WeightFormat, DType, bool>;

inline const auto kHalfDTypes = ::testing::Values(DType::kFloat16, DType::kBFloat16);

}  // namespace moq::kernels::testing

/// The suites Rows, Groups, Float16 and BFloat16 of a fixture with TiledCase: SHAPES in every
/// format with a scale a row or none, GROUPED in those with scales of groups.
#define MOQ_INSTANTIATE_TILED(FIXTURE, SHAPES, GROUPED)                                        \
  INSTANTIATE_TEST_SUITE_P(Rows, FIXTURE,                                                      \
                           ::testing::Combine(SHAPES, ::testing::Values(WeightFormat::kInt8),  \
                                              kHalfDTypes, ::testing::Bool()));                \
  INSTANTIATE_TEST_SUITE_P(                                                                    \
      Groups, FIXTURE,                                                                         \
      ::testing::Combine(GROUPED, ::testing::Values(WeightFormat::kInt8, WeightFormat::kInt4), \
                         kHalfDTypes, ::testing::Bool()));                                     \
  INSTANTIATE_TEST_SUITE_P(                                                                    \
      Float16, FIXTURE,                                                                        \
      ::testing::Combine(SHAPES, ::testing::Values(WeightFormat::kFloat16),                    \
                         ::testing::Values(DType::kFloat16), ::testing::Values(false)));       \
  INSTANTIATE_TEST_SUITE_P(                                                                    \
      BFloat16, FIXTURE,                                                                       \
      ::testing::Combine(SHAPES, ::testing::Values(WeightFormat::kBFloat16),                   \
                         ::testing::Values(DType::kBFloat16), ::testing::Values(false)))
