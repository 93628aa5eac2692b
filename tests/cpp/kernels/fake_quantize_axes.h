#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "tests/cpp/kernels/fake_quantize_problem.h"

/// The axes that the suites of the CPU's and of the CUDA body both run over.
namespace moq::kernels::testing {

using Shape = std::pair<std::int64_t, std::int64_t>;
using Axes = std::tuple<Shape, Storage, Granularity, QuantMode, Rounding>;

/// A size that divides the columns or, where rows share scales, the rows.
inline std::int64_t group_size_of(const Case& c) {
  if (c.granularity == Granularity::kPerRows) {
    return c.rows % 5 == 0 && c.rows > 0 ? c.rows / 5 : std::max<std::int64_t>(c.rows, 1);
  }
  return c.cols % 16 == 0 ? 16 : c.cols % 7 == 0 ? 7 : c.cols;
}

inline Case case_of(const Axes& axes) {
  const auto& [shape, storage, granularity, mode, rounding] = axes;
  Case c;
  c.rows = shape.first;
  c.cols = shape.second;
  c.storage = storage;
  c.granularity = granularity;
  c.mode = mode;
  c.rounding = rounding;
  c.group_size = group_size_of(c);
  return c;
}

inline std::string axes_name(const ::testing::TestParamInfo<Axes>& info) {
  return describe(case_of(info.param));
}

inline const auto kShapes = ::testing::Values(Shape{1, 1}, Shape{0, 5}, Shape{3, 0}, Shape{31, 37},
                                              Shape{1, 1030}, Shape{300, 7}, Shape{67, 1552});
inline const auto kGranularities =
    ::testing::Values(Granularity::kPerTensor, Granularity::kPerChannel, Granularity::kPerGroup,
                      Granularity::kPerRows);
inline const auto kModes = ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric);
inline const auto kRoundings = ::testing::Values(Rounding::kNearest, Rounding::kStochastic);

/// Grids that are searched or given, at a width where they differ from those of the extent.
struct Search {
  QuantMode mode;
  ScaleRule scale_rule;
  int num_bits;
  Rounding rounding = Rounding::kNearest;
};
using Searches = std::tuple<Shape, Storage, Granularity, DType, Search>;

inline Case case_of(const Searches& axes) {
  Case c;
  Shape shape;
  Search search;
  std::tie(shape, c.storage, c.granularity, c.input_dtype, search) = axes;
  std::tie(c.rows, c.cols) = shape;
  c.output_dtype = c.input_dtype;
  c.scale_dtype = c.input_dtype;
  c.mode = search.mode;
  c.scale_rule = search.scale_rule;
  c.num_bits = search.num_bits;
  c.rounding = search.rounding;
  c.group_size = group_size_of(c);
  return c;
}

inline std::string searches_name(const ::testing::TestParamInfo<Searches>& info) {
  return describe(case_of(info.param));
}

inline const auto kSearchShapes = ::testing::Values(Shape{1, 1}, Shape{0, 5}, Shape{3, 0},
                                                    Shape{35, 37}, Shape{300, 7}, Shape{65, 1552});
inline const auto kSearches =
    ::testing::Values(Search{QuantMode::kTernary, ScaleRule::kExtent, 2},
                      Search{QuantMode::kTernary, ScaleRule::kExtent, 5},
                      Search{QuantMode::kBinary, ScaleRule::kExtent, 1},
                      Search{QuantMode::kBinary, ScaleRule::kExtent, 2},
                      Search{QuantMode::kBinary, ScaleRule::kMse, 3},
                      Search{QuantMode::kSymmetric, ScaleRule::kMse, 2},
                      Search{QuantMode::kSymmetric, ScaleRule::kMse, 4, Rounding::kStochastic},
                      Search{QuantMode::kAsymmetric, ScaleRule::kMse, 3},
                      Search{QuantMode::kSymmetric, ScaleRule::kGiven, 4},
                      Search{QuantMode::kSymmetric, ScaleRule::kGiven, 6, Rounding::kStochastic});

/// Matrices with one scale, of which several holders have rows.
using Parts = std::tuple<Shape, Storage, Search>;

inline Case case_of(const Parts& axes) {
  const auto& [shape, storage, search] = axes;
  return case_of(Searches{shape, storage, Granularity::kPerTensor, DType::kFloat32, search});
}

inline std::string parts_name(const ::testing::TestParamInfo<Parts>& info) {
  return describe(case_of(info.param));
}

inline const auto kPartsSearches =
    ::testing::Values(Search{QuantMode::kSymmetric, ScaleRule::kExtent, 4, Rounding::kStochastic},
                      Search{QuantMode::kAsymmetric, ScaleRule::kExtent, 8},
                      Search{QuantMode::kTernary, ScaleRule::kExtent, 2},
                      Search{QuantMode::kBinary, ScaleRule::kExtent, 1},
                      Search{QuantMode::kBinary, ScaleRule::kExtent, 5},
                      Search{QuantMode::kAsymmetric, ScaleRule::kMse, 3});

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
  std::tie(c.storage, c.granularity, c.input_dtype) = in_place;
  c.group_size = group_size_of(c);
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
  c.rows = 25;
  c.cols = 48;
  c.blend_ratio = blend_ratio;
  float element;
  std::tie(c.storage, c.granularity, c.mode, element) = bad;
  c.num_bits = c.mode == QuantMode::kBinary ? 1 : c.mode == QuantMode::kTernary ? 2 : 8;
  c.group_size = group_size_of(c);
  Problem problem(c);
  problem.set(20, 17, element);
  return problem;
}

inline const auto kAllModes = ::testing::Values(QuantMode::kSymmetric, QuantMode::kAsymmetric,
                                                QuantMode::kTernary, QuantMode::kBinary);
inline const auto kNonFinite = ::testing::Values(
    std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
    std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN());

}  // namespace moq::kernels::testing
