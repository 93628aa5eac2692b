#pragma once

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "tests/cpp/kernels/fake_quantize_problem.h"

/// The axes that the suites of the CPU's and of the CUDA body both run over.
namespace moq::kernels::testing {

using Shape = std::pair<std::int64_t, std::int64_t>;
using Axes = std::tuple<Shape, Storage, Granularity, QuantMode, Rounding>;

inline Case case_of(const Axes& axes) {
  const auto& [shape, storage, granularity, mode, rounding] = axes;
  Case c;
  c.rows = shape.first;
  c.cols = shape.second;
  c.storage = storage;
  c.granularity = granularity;
  c.mode = mode;
  c.rounding = rounding;
  c.group_size = c.cols % 16 == 0 ? 16 : c.cols % 7 == 0 ? 7 : c.cols;
  return c;
}

inline std::string axes_name(const ::testing::TestParamInfo<Axes>& info) {
  return describe(case_of(info.param));
}

inline const auto kShapes = ::testing::Values(Shape{1, 1}, Shape{0, 5}, Shape{3, 0}, Shape{31, 37},
                                              Shape{1, 1030}, Shape{300, 7}, Shape{67, 1552});
inline const auto kGranularities =
    ::testing::Values(Granularity::kPerTensor, Granularity::kPerChannel, Granularity::kPerGroup);
inline const auto kModes = ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric);
inline const auto kRoundings = ::testing::Values(Rounding::kNearest, Rounding::kStochastic);

using DTypes = std::tuple<DType, DType, Storage, Rounding>;

inline Case case_of(const DTypes& dtypes) {
  Case c;
  std::tie(c.input_dtype, c.output_dtype, c.storage, c.rounding) = dtypes;
  c.rows = 19;
  c.cols = 75;
  c.scale_dtype = c.input_dtype;
  c.mode = QuantMode::kAsymmetric;
  return c;
}

inline std::string dtypes_name(const ::testing::TestParamInfo<DTypes>& info) {
  const auto& [input, output, storage, rounding] = info.param;
  return std::string(moq::name_of(input)) + "_" + moq::name_of(output) + "_" + name_of(storage) +
         (rounding == Rounding::kNearest ? "_nearest" : "_stochastic");
}

inline const auto kStorages =
    ::testing::Values(Storage::kLinear, Storage::kConv1d, Storage::kScattered);
inline const auto kFloats = ::testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16);

/// A matrix that is its own output. `blank.output` is the storage before the call.
using InPlace = std::tuple<Storage, Granularity, DType>;

inline Problem problem_of(const InPlace& in_place) {
  Case c;
  c.rows = 45;
  c.cols = 64;
  c.group_size = 16;
  std::tie(c.storage, c.granularity, c.input_dtype) = in_place;
  c.output_dtype = c.input_dtype;
  Problem problem(c);
  problem.blank.output = problem.input;
  return problem;
}

inline std::string in_place_name(const ::testing::TestParamInfo<InPlace>& info) {
  return describe(problem_of(info.param).parameters);
}

/// One element that is no number, in a matrix of many groups.
using BadGroup = std::tuple<Storage, Granularity, QuantMode, float>;

inline Problem problem_of(const BadGroup& bad, float blend_ratio) {
  Case c;
  c.rows = 21;
  c.cols = 48;
  c.group_size = 16;
  c.blend_ratio = blend_ratio;
  float element;
  std::tie(c.storage, c.granularity, c.mode, element) = bad;
  Problem problem(c);
  problem.set(20, 17, element);
  return problem;
}

inline const auto kNonFinite = ::testing::Values(
    std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
    std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN());

}  // namespace moq::kernels::testing
