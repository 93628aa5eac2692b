#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/host_device.h"
#include "kernels/common/integer_math.h"
#include "kernels/learned_scale.h"

/// What the CPU and the CUDA bodies of learned_scale.h share.
namespace moq::kernels {

constexpr int kSumLanes = 64;                ///< sums that a run's numbers are dealt to
constexpr std::int64_t kSummedAtOnce = 512;  ///< numbers of a run

/// The two derivatives; what one reads the other writes.
enum class Derivative : std::uint8_t { kGradient, kTangent };

/// Either call, as the kernels see it.
struct LearnedScaleCall {
  FakeQuantizeTensor matrix;
  const std::int32_t* num_bits;
  const float* blend_ratio;
  const void* input;             ///< gradient of the output, or direction of the weight
  const float* absmax_tangent;   ///< direction of absmax; kTangent
  void* output;                  ///< gradient of the weight, or derivative of the output; or null
  float* sums = nullptr;         ///< [num_groups, runs_per_group]; kGradient
  float* grad_absmax = nullptr;  ///< [num_groups]; kGradient
};

/// The runs that a matrix is cut into: those of a group lie one behind the other.
struct Runs {
  std::int64_t groups_per_row;
  std::int64_t group_cols;     ///< columns of a row that share a scale
  std::int64_t per_group_row;  ///< runs of a group in one row
  std::int64_t per_row;
  std::int64_t per_group;
  std::int64_t rows_per_group;

  /// Group of a row's g-th group.
  MOQ_HOST_DEVICE std::int64_t group_of(std::int64_t row, std::int64_t g) const {
    return rows_per_group > 1 ? row / rows_per_group : row * groups_per_row + g;
  }
};

MOQ_HOST_DEVICE inline Runs runs_of(const FakeQuantizeTensor& matrix) {
  const std::int64_t group_cols = columns_per_group(matrix);
  const std::int64_t per_group_row = divide_up(group_cols, kSummedAtOnce);
  const std::int64_t groups_per_row = kernels::groups_per_row(matrix);
  const std::int64_t rows_per_group = kernels::rows_per_group(matrix);
  return {groups_per_row,
          group_cols,
          per_group_row,
          groups_per_row * per_group_row,
          rows_per_group * per_group_row,
          rows_per_group};
}

/// What all elements of a call share.
struct LearnedWidth {
  std::int32_t num_bits;
  float blend;       ///< the weight's share of the output
  float grid_share;  ///< 1 - blend

  MOQ_HOST_DEVICE LearnedWidth(std::int32_t bits, const float* blend_ratio)
      : num_bits(bits),
        blend(bits != 0 && blend_ratio != nullptr ? *blend_ratio : 0.0F),
        grid_share(1.0F - blend) {}

  /// Whether the output is the weight.
  MOQ_HOST_DEVICE bool copies() const { return num_bits == 0; }
};

MOQ_HOST_DEVICE inline GridParams learned_grid(const FakeQuantizeTensor& matrix, std::int64_t group,
                                               const LearnedWidth& width) {
  if (width.num_bits < min_bits(QuantMode::kSymmetric) || width.num_bits > kMaxBits) {
    const float nan = std::bit_cast<float>(kQuietNaNBits);
    return {nan, nan, 0, {0, 0}};
  }
  return make_grid(given_statistics(matrix, group), width.num_bits, QuantMode::kSymmetric,
                   matrix.scale_dtype);
}

/// The part of absmax in a derivative by the step size, or of a direction of absmax in one of the
/// step size: both are multiplied by d s / d absmax, and by the grid's share.
MOQ_HOST_DEVICE inline float by_absmax(float by_step, const FakeQuantizeTensor& matrix,
                                       std::int64_t group, const LearnedWidth& width) {
  if (width.copies()) {
    return 0.0F;
  }
  const auto qmax = static_cast<float>(grid_range(width.num_bits, QuantMode::kSymmetric).qmax);
  const float magnitude = by_step / qmax * width.grid_share;
  return matrix.given_absmax[group] < 0.0F ? -magnitude : magnitude;
}

/// The sum of 64 numbers, in halves. Always inline: a copy of its own that was compiled for one
/// instruction set could be linked where there is none.
[[gnu::always_inline]] inline float sum_in_halves(float (&lanes)[kSumLanes]) {
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

inline void check_learned_scale(const LearnedScale& point, bool has_pointers) {
  const FakeQuantizeTensor& matrix = point.matrix;
  check_matrix(matrix, "learned_scale", "the weight");
  MOQ_CHECK(matrix.scale_rule == ScaleRule::kGiven && matrix.rounding == Rounding::kNearest,
            "learned_scale: scales must be given and rounding nearest, got others");
  MOQ_CHECK(rows_are_contiguous(matrix) || columns_are_contiguous(matrix),
            "learned_scale: row_stride or col_stride must be 1, got ", matrix.row_stride, " and ",
            matrix.col_stride);
  MOQ_CHECK(point.num_bits != nullptr, "learned_scale: num_bits must not be null");
  MOQ_CHECK(has_pointers || matrix.rows == 0 || matrix.cols == 0,
            "learned_scale: what is read and written must not be null");
}

}  // namespace moq::kernels
