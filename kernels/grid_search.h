#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/quant_grid.h"

/// Grids that need more of a group than its extent: means of magnitudes (ternary, binary) and the
/// clipping with the smallest squared error. Each sweep over the group gives one sum of integers,
/// so that CPU and CUDA agree bit for bit whatever the order of the elements.
namespace moq {

/// What the scale of a rounded grid is made of.
enum class ScaleRule : std::uint8_t {
  kExtent,  ///< the group's smallest and largest element
  kMse,     ///< that extent times the ratio among 1, 31/32 … 9/32 with the least squared error
  kGiven,   ///< a given number per group in place of absmax (a learned scale); symmetric only
};

/// What a group's grid depends on besides its elements.
struct GridSpec {
  int num_bits = 8;
  QuantMode mode = QuantMode::kSymmetric;
  ScaleRule scale_rule = ScaleRule::kExtent;
  DType scale_dtype = DType::kFloat32;
};

/// Clipping ratios that are tried: enough for 2 bits, where the best is about a third.
constexpr int kMseCandidates = 24;

/// Sweeps over a group that its grid needs after its extent is known.
MOQ_HOST_DEVICE constexpr int num_sweeps(const GridSpec& spec) {
  if (has_sign_codes(spec.mode, spec.num_bits)) {
    return spec.num_bits;  // binary: the mean; ternary: and that of what lies above the threshold
  }
  return spec.scale_rule == ScaleRule::kMse ? kMseCandidates : 0;
}

/// True if some width needs any: what is known where the width is not.
constexpr bool may_sweep(QuantMode mode, ScaleRule scale_rule) {
  return mode == QuantMode::kTernary || mode == QuantMode::kBinary || scale_rule == ScaleRule::kMse;
}

/// What one sweep sums up.
struct Sweep {
  bool squared_error;  ///< of `grid`'s nearest codes; else magnitudes
  float to_unit;       ///< a power of two: magnitudes and errors are counted in 1 / to_unit
  float threshold;     ///< only elements of a larger magnitude are counted; negative: all
  GridParams grid;
};

/// The sum over those elements, in units (squared for errors), and their number.
struct SweepSums {
  std::int64_t sum = 0;
  std::int64_t count = 0;
};

/// No term of a sweep is larger than this.
constexpr float kLargestMagnitude = 0x1p30F;
constexpr float kLargestError = 0x1p15F;

MOQ_HOST_DEVICE inline void add(SweepSums& sums, const Sweep& sweep, float value) {
  if (!(fabsf(value) > sweep.threshold)) {
    return;
  }
  ++sums.count;
  if (sweep.squared_error) {
    const std::int32_t code = quantize_one(value, sweep.grid, Rounding::kNearest, 0.0F);
    const float error = fabsf(value - dequantize_one(code, sweep.grid));
    const auto units =
        static_cast<std::int32_t>(smaller(rintf(error * sweep.to_unit), kLargestError));
    sums.sum += units * units;
  } else {
    sums.sum +=
        static_cast<std::int32_t>(smaller(rintf(fabsf(value) * sweep.to_unit), kLargestMagnitude));
  }
}

/// Sweeps are made in stages: those of one stage do not wait for each other's sums.
constexpr int kSweepStages = 2;
MOQ_HOST_DEVICE constexpr int stage_of_sweep(const GridSpec& spec, int index) {
  return has_sign_codes(spec.mode, spec.num_bits) ? index : 0;
}

/// What is collected of one group.
struct GroupCollection {
  GroupStatistics extent;
  SweepSums sums[kMseCandidates];
};

/// Finds the grid of one group: take(i, what sweep(i) gave) for each i below num_sweeps in order,
/// then grid().
class GridSearch {
 public:
  GridSearch() = default;
  MOQ_HOST_DEVICE inline GridSearch(const GroupStatistics& group, const GridSpec& spec)
      : group_(group), spec_(spec) {}

  MOQ_HOST_DEVICE inline Sweep sweep(int index) const {
    const bool errors = !has_sign_codes(spec_.mode, spec_.num_bits);
    // In a group without a grid nothing is counted.
    const float threshold =
        has_nonfinite(group_) ? std::bit_cast<float>(kInfinityBits) : threshold_;
    return {errors, to_unit(errors ? kErrorBits : kMagnitudeBits), threshold,
            errors ? candidate(index) : GridParams{}};
  }

  MOQ_HOST_DEVICE inline void take(int index, const SweepSums& sums) {
    if (!has_sign_codes(spec_.mode, spec_.num_bits)) {
      if (index == 0 || sums.sum < least_error_) {
        least_error_ = sums.sum;
        best_ = index;
      }
      return;
    }
    mean_ = mean(sums);
    if (spec_.num_bits == 1) {
      threshold_ = 0.0F;
    } else if (index == 0) {
      threshold_ = 0.7F * mean_;
    }
  }

  MOQ_HOST_DEVICE inline GridParams grid() const {
    if (has_nonfinite(group_) || num_sweeps(spec_) == 0) {
      return make_grid(group_, spec_.num_bits, spec_.mode, spec_.scale_dtype);
    }
    if (!has_sign_codes(spec_.mode, spec_.num_bits)) {
      return candidate(best_);
    }
    const float scale = stored_scale(mean_, spec_.scale_dtype);
    return {scale, 1.0F / scale, 0, {-1, 1}, threshold_};
  }

 private:
  // Largest magnitudes and errors take so many bits: a sum of 2^33 of them fits into 64 bits, and
  // four of them into what vectors add up in 32.
  static constexpr int kMagnitudeBits = 30;
  static constexpr int kErrorBits = 15;

  MOQ_HOST_DEVICE inline float largest_magnitude() const {
    return larger(fabsf(lo()), fabsf(hi()));
  }
  MOQ_HOST_DEVICE inline float lo() const {
    return std::bit_cast<float>(ordered_bits(group_.lowest));
  }
  MOQ_HOST_DEVICE inline float hi() const {
    return std::bit_cast<float>(ordered_bits(group_.highest));
  }

  /// The power of two that brings the largest magnitude into [2^(bits - 1), 2^bits), or 2^126.
  MOQ_HOST_DEVICE inline float to_unit(int bits) const {
    const int exponent = (std::bit_cast<std::int32_t>(largest_magnitude()) >> 23) - 127;
    const int shift = bits - 1 - exponent < 126 ? bits - 1 - exponent : 126;
    return std::bit_cast<float>((shift + 127) << 23);
  }

  MOQ_HOST_DEVICE inline float mean(const SweepSums& sums) const {
    if (sums.count == 0) {
      return 0.0F;
    }
    return static_cast<float>(static_cast<double>(sums.sum) / static_cast<double>(sums.count) /
                              static_cast<double>(to_unit(kMagnitudeBits)));
  }

  MOQ_HOST_DEVICE inline GridParams candidate(int index) const {
    if (has_nonfinite(group_)) {
      return make_grid(group_, spec_.num_bits, spec_.mode, spec_.scale_dtype);
    }
    const float ratio = 1.0F - static_cast<float>(index) * (1.0F / 32.0F);
    return make_grid(lo() * ratio, hi() * ratio, spec_.num_bits, spec_.mode, spec_.scale_dtype);
  }

  GroupStatistics group_;
  GridSpec spec_;
  float threshold_ = -1.0F;
  float mean_ = 0.0F;
  std::int64_t least_error_ = 0;
  int best_ = 0;
};

}  // namespace moq
