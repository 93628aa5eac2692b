#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <ostream>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/common/philox.h"
#include "kernels/common/visit.h"
#include "kernels/fake_quantize.h"

/// One matrix to fake-quantize, owned, and the slow obvious answer to it: the formulas of
/// kernels/fake_quantize.h, one element at a time. What is tested must give the same bits.
namespace moq::kernels::testing {

/// How [rows, cols] lies in memory; each leaves unused elements between rows, which must stay.
enum class Storage { kLinear, kConv1d, kScattered };

inline const char* name_of(Storage storage) {
  return storage == Storage::kLinear   ? "linear"
         : storage == Storage::kConv1d ? "conv1d"
                                       : "scattered";
}

inline const char* name_of(Granularity granularity) {
  return granularity == Granularity::kPerTensor    ? "per_tensor"
         : granularity == Granularity::kPerChannel ? "per_channel"
         : granularity == Granularity::kPerGroup   ? "per_group"
                                                   : "per_rows";
}

inline const char* name_of(QuantMode mode) {
  return mode == QuantMode::kSymmetric    ? "symmetric"
         : mode == QuantMode::kAsymmetric ? "asymmetric"
         : mode == QuantMode::kTernary    ? "ternary"
                                          : "binary";
}

struct Case {
  std::int64_t rows = 1;
  std::int64_t cols = 1;
  Storage storage = Storage::kLinear;
  Granularity granularity = Granularity::kPerChannel;
  QuantMode mode = QuantMode::kSymmetric;
  Rounding rounding = Rounding::kNearest;
  std::int64_t group_size = 0;  ///< 0: cols for per group, rows for per rows
  ScaleRule scale_rule = ScaleRule::kExtent;
  int num_bits = 8;
  float blend_ratio = 0.0F;
  DType input_dtype = DType::kFloat32;
  DType output_dtype = DType::kFloat32;
  DType scale_dtype = DType::kFloat32;
  DType codes_dtype = DType::kInt8;
  std::int64_t first_element = 0;
  std::int64_t unsharded_cols = 0;
  std::int64_t padding = -1;  ///< elements between rows (columns in kConv1d); -1: an odd number
  std::uint64_t seed = 0x0123456789abcdefULL;
  std::int64_t step = 7;
  std::uint32_t name_hash = 0x9e3779b9U;
};

inline std::string describe(const Case& c) {
  return std::to_string(c.rows) + "x" + std::to_string(c.cols) + "_" + name_of(c.storage) + "_" +
         name_of(c.granularity) + "_" + name_of(c.mode) +
         (c.scale_rule == ScaleRule::kMse     ? "_mse_"
          : c.scale_rule == ScaleRule::kGiven ? "_given_"
                                              : "_") +
         (c.rounding == Rounding::kNearest ? "nearest" : "stochastic") + "_" +
         moq::name_of(c.input_dtype) + "_" + moq::name_of(c.output_dtype) + "_" +
         std::to_string(c.num_bits) + "bit";
}

inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << describe(c);
}

/// Everything a call writes.
struct Result {
  std::vector<std::byte> output;  ///< the whole storage, gaps included
  std::vector<std::byte> codes;
  std::vector<std::byte> scales;
  std::vector<std::int32_t> zero_points;

  friend bool operator==(const Result&, const Result&) = default;
};

/// One case with its weights. `result` starts filled with a pattern that nothing computes.
struct Problem {
  Case parameters;
  std::int64_t row_stride = 0;
  std::int64_t col_stride = 0;
  std::vector<std::byte> input;
  std::vector<float> given_absmax;
  Result blank;

  explicit Problem(const Case& c) : parameters(c) {
    switch (c.storage) {
      case Storage::kLinear:
        row_stride = c.cols + (c.padding < 0 ? 3 : c.padding);
        col_stride = 1;
        break;
      case Storage::kConv1d:
        row_stride = 1;
        col_stride = c.rows + (c.padding < 0 ? 5 : c.padding);
        break;
      case Storage::kScattered:
        row_stride = 2 * c.cols + 3;
        col_stride = 2;
        break;
    }
    if (parameters.granularity == Granularity::kPerGroup && parameters.group_size == 0) {
      parameters.group_size = c.cols;
    }
    if (parameters.granularity == Granularity::kPerRows && parameters.group_size == 0) {
      parameters.group_size = std::max<std::int64_t>(c.rows, 1);
    }
    const std::int64_t groups = c.granularity == Granularity::kPerTensor    ? 1
                                : c.granularity == Granularity::kPerChannel ? c.rows
                                : c.granularity == Granularity::kPerRows
                                    ? c.rows / parameters.group_size
                                    : c.rows * (c.cols / parameters.group_size);
    for (std::int64_t group = 0; group < groups; ++group) {
      // Around the largest weight, 0.032: some clip, some do not.
      given_absmax.push_back(0.01F + 0.004F * static_cast<float>(group % 9));
    }
    const auto elements = static_cast<std::size_t>(span());
    input.resize(elements * size_of(c.input_dtype));
    constexpr std::byte kPattern{0xa5};
    blank.output.assign(elements * size_of(c.output_dtype), kPattern);
    blank.codes.assign(static_cast<std::size_t>(c.rows * c.cols) * size_of(c.codes_dtype),
                       kPattern);
    blank.scales.assign(static_cast<std::size_t>(groups) * size_of(c.scale_dtype), kPattern);
    blank.zero_points.assign(static_cast<std::size_t>(groups), -12345);
    for (std::int64_t row = 0; row < c.rows; ++row) {
      for (std::int64_t col = 0; col < c.cols; ++col) {
        set(row, col, weight(row * c.cols + col));
      }
    }
  }

  /// Elements from the first to one past the last, gaps included.
  std::int64_t span() const {
    const Case& c = parameters;
    return c.rows == 0 || c.cols == 0 ? 0
                                      : (c.rows - 1) * row_stride + (c.cols - 1) * col_stride + 1;
  }

  /// Roughly normal weights around a small offset, some of them exactly 0.
  static float weight(std::int64_t i) {
    const PhiloxBlock block = philox4x32({{static_cast<std::uint32_t>(i), 0, 0, 0}}, 99);
    if (block.word[3] % 13 == 0) {
      return 0.0F;
    }
    return 0.02F * (uniform_from_word(block.word[0]) + uniform_from_word(block.word[1]) +
                    uniform_from_word(block.word[2]) - 1.4F);
  }

  float get(std::int64_t row, std::int64_t col) const {
    return visit_float(parameters.input_dtype, [&]<typename Element>(Element element) {
      std::memcpy(&element, input.data() + place(row, col) * sizeof(Element), sizeof(Element));
      return to_float(element);
    });
  }

  void set(std::int64_t row, std::int64_t col, float value) {
    visit_float(parameters.input_dtype, [&]<typename Element>(Element element) {
      store_float(&element, value);
      std::memcpy(input.data() + place(row, col) * sizeof(Element), &element, sizeof(Element));
    });
  }

  std::size_t place(std::int64_t row, std::int64_t col) const {
    return static_cast<std::size_t>(row * row_stride + col * col_stride);
  }

  /// The call's description of this matrix, with the given memory.
  FakeQuantizeTensor tensor(const void* input_data, void* output, void* codes, void* scales,
                            std::int32_t* zero_points) const {
    const Case& c = parameters;
    return {.input = input_data,
            .output = output,
            .codes = codes,
            .scales = scales,
            .zero_points = zero_points,
            .rows = c.rows,
            .cols = c.cols,
            .row_stride = row_stride,
            .col_stride = col_stride,
            .group_size = c.group_size,
            .given_absmax = c.scale_rule == ScaleRule::kGiven ? given_absmax.data() : nullptr,
            .first_element = c.first_element,
            .unsharded_cols = c.unsharded_cols,
            .name_hash = c.name_hash,
            .input_dtype = c.input_dtype,
            .output_dtype = c.output_dtype,
            .codes_dtype = c.codes_dtype,
            .scale_dtype = c.scale_dtype,
            .granularity = c.granularity,
            .mode = c.mode,
            .rounding = c.rounding,
            .scale_rule = c.scale_rule};
  }

  FakeQuantizeTensor tensor(Result& result) const {
    return tensor(input.data(), result.output.data(), result.codes.data(), result.scales.data(),
                  result.zero_points.data());
  }
};

/// The rows [begin, end) of a matrix whose rows share one scale, for one of several holders.
inline FakeQuantizeTensor part_of(FakeQuantizeTensor matrix, std::int64_t begin, std::int64_t end) {
  const auto offset = [](auto pointer, std::int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(pointer)>>,
                                    const std::byte, std::byte>;
    return static_cast<Byte*>(pointer) + bytes;
  };
  const auto size = [](DType dtype) { return static_cast<std::int64_t>(size_of(dtype)); };
  const std::int64_t first = begin * matrix.row_stride;
  matrix.input = offset(matrix.input, first * size(matrix.input_dtype));
  matrix.output = offset(matrix.output, first * size(matrix.output_dtype));
  matrix.codes = offset(matrix.codes, begin * matrix.cols * size(matrix.codes_dtype));
  matrix.unsharded_cols = matrix.cols;
  matrix.first_element += begin * matrix.cols;
  matrix.rows = end - begin;
  return matrix;
}

/// Where the parts of a matrix end that several holders have.
inline std::vector<std::int64_t> ends_of_parts(std::int64_t rows) {
  return {0, rows / 3, rows / 3, rows / 2, rows};
}

/// Brings together what holders of parts have collected; `before` is what all had before the stage.
inline void combine(std::vector<GroupCollection>& parts, const GroupCollection& before) {
  GroupCollection all = before;
  for (const GroupCollection& part : parts) {
    all.extent.lowest = std::min(all.extent.lowest, part.extent.lowest);
    all.extent.highest = std::max(all.extent.highest, part.extent.highest);
    for (int i = 0; i < kMseCandidates; ++i) {
      all.sums[i].sum += part.sums[i].sum - before.sums[i].sum;
      all.sums[i].count += part.sums[i].count - before.sums[i].count;
    }
  }
  std::ranges::fill(parts, all);
}

/// Draw of one element.
inline float reference_uniform(const Case& c, std::int64_t row, std::int64_t col) {
  const std::int64_t pitch = c.unsharded_cols != 0 ? c.unsharded_cols : c.cols;
  const auto element = static_cast<std::uint64_t>(c.first_element + row * pitch + col);
  const PhiloxBlock block = philox4x32(
      {{static_cast<std::uint32_t>(element / 8), static_cast<std::uint32_t>(element / 8 >> 32),
        static_cast<std::uint32_t>(c.step), c.name_hash}},
      c.seed);
  return static_cast<float>(half_of(block, static_cast<int>(element % 8))) * 0x1p-16F;
}

/// Code of one element that is rounded: in float64 where the draw is added, which holds the sum.
inline std::int32_t reference_code(const Case& c, float value, const GridParams& grid,
                                   std::int64_t row, std::int64_t col) {
  const double position = value * grid.inverse_scale;
  const double rounded = c.rounding == Rounding::kNearest
                             ? std::nearbyint(position)
                             : std::floor(position + double{reference_uniform(c, row, col)});
  return static_cast<std::int32_t>(
      std::clamp<double>(rounded + grid.zero_point, grid.range.qmin, grid.range.qmax));
}

template <typename Element>
void put(std::vector<std::byte>& bytes, std::size_t place, Element element) {
  std::memcpy(bytes.data() + place * sizeof(Element), &element, sizeof(Element));
}

inline void put_float(std::vector<std::byte>& bytes, DType dtype, std::size_t place, float value) {
  visit_float(dtype, [&]<typename Element>(Element element) {
    store_float(&element, value);
    put(bytes, place, element);
  });
}

/// A scale of float32 as it is stored.
inline float reference_scale(float exact, DType dtype) {
  return std::fmin(std::fmax(round_to(exact, dtype), min_scale(dtype)), max_scale(dtype));
}

/// Mean magnitude of the values above a threshold. Magnitudes are counted in units of at most
/// 2^-29 of the largest one.
inline float reference_mean(const std::vector<float>& values, float threshold) {
  float largest = 0.0F;
  for (const float value : values) largest = std::fmax(largest, std::fabs(value));
  int exponent = -126;
  std::frexp(largest, &exponent);  // largest < 2^exponent
  const double unit = std::fmax(std::ldexp(1.0, exponent - 30), std::ldexp(1.0, -126));
  double sum = 0.0;
  double count = 0.0;
  for (const float value : values) {
    if (std::fabs(value) > threshold) {
      sum += std::nearbyint(static_cast<double>(std::fabs(value)) / unit);
      count += 1.0;
    }
  }
  return count == 0.0 ? 0.0F : static_cast<float>(sum / count * unit);
}

/// The grid among the clipped ones that has the least squared error, the least clipped of equals.
/// Errors are counted in units of at most 2^-14 of the largest magnitude.
inline GridParams reference_mse_grid(const std::vector<float>& values, float lo, float hi,
                                     const Case& c) {
  int exponent = -126;
  std::frexp(std::fmax(-lo, hi), &exponent);
  const double unit = std::fmax(std::ldexp(1.0, exponent - 15), std::ldexp(1.0, -126));
  GridParams best{};
  double least = std::numeric_limits<double>::infinity();
  for (int clipped = 32; clipped >= 9; --clipped) {
    const float ratio = static_cast<float>(clipped) / 32.0F;
    const GridParams grid = make_grid(lo * ratio, hi * ratio, c.num_bits, c.mode, c.scale_dtype);
    double error = 0.0;
    for (const float value : values) {
      const std::int32_t code = quantize_one(value, grid, Rounding::kNearest, 0.0F);
      const float off = std::fabs(value - dequantize_one(code, grid));
      error += std::pow(std::fmin(std::nearbyint(static_cast<double>(off) / unit), 32768.0), 2.0);
    }
    if (error < least) {
      least = error;
      best = grid;
    }
  }
  return best;
}

/// Code of one element by a ternary or binary grid.
inline std::int32_t reference_sign(float value, float threshold) {
  return std::fabs(value) <= threshold ? 0 : value < 0.0F ? -1 : 1;
}

/// The group of rows [row_begin, row_end) and columns [col_begin, col_end), number `group`.
inline void reference_group(const Problem& problem, std::int64_t row_begin, std::int64_t row_end,
                            std::int64_t col_begin, std::int64_t col_end, std::size_t group,
                            Result& result) {
  const Case& c = problem.parameters;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool signs =
      c.num_bits == 1 ||
      (c.num_bits == 2 && (c.mode == QuantMode::kTernary || c.mode == QuantMode::kBinary));
  std::vector<float> values;
  float lo = 0.0F;
  float hi = 0.0F;
  bool finite = true;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t col = col_begin; col < col_end; ++col) {
      const float value = problem.get(row, col);
      values.push_back(value);
      finite = finite && std::isfinite(value);
      lo = std::fmin(lo, value);
      hi = std::fmax(hi, value);
    }
  }
  if (c.mode != QuantMode::kAsymmetric) {
    hi = std::fmax(hi, -lo);
    lo = 0.0F;
  }
  if (c.scale_rule == ScaleRule::kGiven) {
    hi = problem.given_absmax[group];
    finite = true;
  }
  GridParams grid{nan, nan, 0, grid_range(c.num_bits, c.mode)};
  float threshold = 0.0F;
  if (finite && signs) {
    threshold = c.num_bits == 2 ? 0.7F * reference_mean(values, -1.0F) : 0.0F;
    grid.scale =
        reference_scale(reference_mean(values, c.num_bits == 2 ? threshold : -1.0F), c.scale_dtype);
  } else if (finite && c.scale_rule == ScaleRule::kMse) {
    grid = reference_mse_grid(values, lo, hi, c);
  } else if (finite) {
    grid = make_grid(lo, hi, c.num_bits, c.mode, c.scale_dtype);
  }
  put_float(result.scales, c.scale_dtype, group, grid.scale);
  result.zero_points[group] = grid.zero_point;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t col = col_begin; col < col_end; ++col) {
      const float value = problem.get(row, col);
      const std::int32_t code = !finite ? 0
                                : signs ? reference_sign(value, threshold)
                                        : reference_code(c, value, grid, row, col);
      float output = finite ? dequantize_one(code, grid) : nan;
      if (finite && c.blend_ratio != 0.0F) {
        output = c.blend_ratio * value + (1.0F - c.blend_ratio) * output;
      }
      put_float(result.output, c.output_dtype, problem.place(row, col), output);
      const auto place = static_cast<std::size_t>(row * c.cols + col);
      if (c.codes_dtype == DType::kInt8) {
        put(result.codes, place, static_cast<std::int8_t>(code));
      } else {
        put(result.codes, place, static_cast<std::int16_t>(code));
      }
    }
  }
}

inline Result reference(const Problem& problem) {
  const Case& c = problem.parameters;
  Result result = problem.blank;
  if (c.granularity == Granularity::kPerTensor) {
    reference_group(problem, 0, c.rows, 0, c.cols, 0, result);
    return result;
  }
  if (c.granularity == Granularity::kPerRows) {
    for (std::int64_t row = 0; row < c.rows; row += c.group_size) {
      reference_group(problem, row, row + c.group_size, 0, c.cols,
                      static_cast<std::size_t>(row / c.group_size), result);
    }
    return result;
  }
  const std::int64_t group_size = c.granularity == Granularity::kPerGroup ? c.group_size : c.cols;
  const std::int64_t groups = c.granularity == Granularity::kPerGroup ? c.cols / group_size : 1;
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t group = 0; group < groups; ++group) {
      reference_group(problem, row, row + 1, group * group_size, (group + 1) * group_size,
                      static_cast<std::size_t>(row * groups + group), result);
    }
  }
  return result;
}

}  // namespace moq::kernels::testing
