#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/half.h"
#include "kernels/common/host_device.h"

/// THE integer grid: the one definition of qmin, qmax, scale, zero point and rounding that the
/// trainer, the exporter, the engine, the CPU and the CUDA kernels share.
///
///   real = scale * (q - zero_point),   q an integer in [qmin, qmax]
///
///   symmetric    qmax = 2^(b-1) - 1, qmin = -qmax (narrow range), zero_point = 0,
///                scale = absmax / qmax: the largest magnitude lies on the end of the grid
///   asymmetric   qmin = -2^(b-1), qmax = 2^(b-1) - 1, lo = min(w, 0), hi = max(w, 0),
///                scale = (hi - lo) / (qmax - qmin), zero_point = clamp(rint(qmin - lo / scale))
///   ternary      2 bits: q = sign(w) where |w| > 0.7 mean |w| and 0 elsewhere, scale = the mean of
///                those |w|; wider: symmetric. Source: Li, Zhang, Liu, "Ternary weight networks",
///                2016
///   binary       1 bit: q = sign(w), scale = mean |w|, and an exact 0 stays 0 (a pruned or padding
///                row must not come alive); 2 bits: ternary; wider: symmetric. Source: Rastegari
///                et al., "XNOR-Net", ECCV 2016
///
/// The scales of the first two are those of their extent; grid_search.h has the others.
///
/// A group that holds a NaN or an infinity has no grid: its scale is NaN, its codes are 0, and so
/// everything it dequantizes to is NaN.
///
/// A scale is rounded to the dtype it will be stored in *before* any code is computed: readers
/// load scales in the model's dtype, and only then is scale * code the number that was trained.
/// Every operation below is one correctly rounded IEEE operation in float32, in the order written;
/// build files that include it with contraction off (-ffp-contract=off, -fmad=false), and host and
/// device agree bit for bit.
namespace moq {

enum class QuantMode : std::uint8_t { kSymmetric, kAsymmetric, kTernary, kBinary };
enum class Rounding : std::uint8_t { kNearest, kStochastic };

/// The widths that have a grid in some mode.
constexpr int kMinBits = 1;
constexpr int kMaxBits = 16;

/// The narrowest width that has a grid in this mode.
MOQ_HOST_DEVICE constexpr int min_bits(QuantMode mode) {
  return mode == QuantMode::kBinary ? 1 : 2;
}

/// True if no grid of the mode has a zero point.
MOQ_HOST_DEVICE constexpr bool is_symmetric(QuantMode mode) {
  return mode != QuantMode::kAsymmetric;
}

/// True if codes of this width are signs: -1, 0 or 1 by a threshold, whatever the rounding.
MOQ_HOST_DEVICE constexpr bool has_sign_codes(QuantMode mode, int num_bits) {
  return num_bits == 1 ||
         (num_bits == 2 && (mode == QuantMode::kTernary || mode == QuantMode::kBinary));
}

/// The end points of the integer grid.
struct GridRange {
  std::int32_t qmin;
  std::int32_t qmax;
};

MOQ_HOST_DEVICE constexpr GridRange grid_range(int num_bits, QuantMode mode) {
  const std::int32_t qmax = num_bits == 1 ? 1 : (std::int32_t{1} << (num_bits - 1)) - 1;
  return {is_symmetric(mode) ? -qmax : -qmax - 1, qmax};
}

/// What one group of weights shares.
struct GridParams {
  float scale;              ///< step size, a number of the scale's storage dtype, > 0
  float inverse_scale;      ///< 1 / scale
  std::int32_t zero_point;  ///< 0 when symmetric
  GridRange range;
  /// Sign codes: magnitudes up to it have code 0. Negative: codes are rounded.
  float threshold = -1.0F;
};

/// The smallest scale that `dtype` stores as a normal number: what an all-zero group gets, and the
/// floor that keeps a tiny group from dividing by a scale that was rounded to zero.
MOQ_HOST_DEVICE constexpr float min_scale(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-14F : 0x1p-126F;
}

/// The largest finite number of `dtype`: what a scale too large for it becomes, so that the group
/// is clamped to the ends of its grid.
MOQ_HOST_DEVICE constexpr float max_scale(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 65504.0F;
    case DType::kBFloat16:
      return 0x1.fep127F;
    default:
      return 0x1.fffffep127F;
  }
}

// Not fmaxf and fminf: those are calls into the C library here, which is slow for small groups.
MOQ_HOST_DEVICE constexpr float larger(float a, float b) {
  return a > b ? a : b;
}
MOQ_HOST_DEVICE constexpr float smaller(float a, float b) {
  return a < b ? a : b;
}

/// The number that is stored for an exact scale of float32: rounded to `dtype`, and kept within its
/// normal numbers. The reciprocal of min_scale must stay finite, hence the floor of 2^-126 and not
/// less.
MOQ_HOST_DEVICE inline float stored_scale(float exact, DType dtype) {
  return smaller(larger(round_to(exact, dtype), min_scale(dtype)), max_scale(dtype));
}

/// Grid of a group of rounded codes from its statistics.
///
/// @param lo, hi       smallest and largest element of the group, finite; symmetric grids use only
///                     max(|lo|, |hi|)
/// @param num_bits     in [2, kMaxBits]
/// @param scale_dtype  float32, float16 or bfloat16: the dtype that stores the scale
MOQ_HOST_DEVICE inline GridParams make_grid(float lo, float hi, int num_bits, QuantMode mode,
                                            DType scale_dtype) {
  const GridRange range = grid_range(num_bits, mode);
  float extent;
  float levels;
  if (is_symmetric(mode)) {
    extent = larger(fabsf(lo), fabsf(hi));
    levels = static_cast<float>(range.qmax);
  } else {
    lo = smaller(lo, 0.0F);
    hi = larger(hi, 0.0F);
    extent = hi - lo;
    levels = static_cast<float>(range.qmax - range.qmin);
  }
  const float scale = stored_scale(extent / levels, scale_dtype);
  const float inverse_scale = 1.0F / scale;
  std::int32_t zero_point = 0;
  if (mode == QuantMode::kAsymmetric) {
    const float exact = static_cast<float>(range.qmin) - lo * inverse_scale;
    zero_point = static_cast<std::int32_t>(smaller(
        larger(rintf(exact), static_cast<float>(range.qmin)), static_cast<float>(range.qmax)));
  }
  return {scale, inverse_scale, zero_point, range};
}

/// What the elements of one group decide their grid by, collected on bit patterns with integer
/// minimum and maximum: exact, independent of the order, and a NaN cannot slip through.
/// A default one is that of an all-zero group.
struct GroupStatistics {
  std::int32_t lowest = 0;  ///< asymmetric: ordered_bits of the smallest element or 0
  std::int32_t highest =
      0;  ///< asymmetric: ordered_bits of the largest or 0; symmetric: bits of absmax
};

constexpr std::int32_t kMagnitudeMask = 0x7fffffff;
constexpr std::int32_t kInfinityBits = 0x7f800000;
constexpr std::int32_t kQuietNaNBits = 0x7fc00000;
constexpr std::int32_t kLowestFiniteBits = -kInfinityBits;  ///< ordered_bits of -FLT_MAX

/// An integer that is ordered as the numbers are, NaN outside both infinities. Its own inverse.
MOQ_HOST_DEVICE inline std::int32_t ordered_bits(std::int32_t bits) {
  return bits ^ ((bits >> 31) & kMagnitudeMask);
}

/// True if a NaN or an infinity is among the group's elements.
MOQ_HOST_DEVICE inline bool has_nonfinite(const GroupStatistics& group) {
  return group.highest >= kInfinityBits || group.lowest < kLowestFiniteBits;
}

/// Grid of a group from what was collected over its elements.
MOQ_HOST_DEVICE inline GridParams make_grid(const GroupStatistics& group, int num_bits,
                                            QuantMode mode, DType scale_dtype) {
  if (has_nonfinite(group)) {
    const float nan = std::bit_cast<float>(kQuietNaNBits);
    return {nan, nan, 0, grid_range(num_bits, mode)};
  }
  return make_grid(std::bit_cast<float>(ordered_bits(group.lowest)),
                   std::bit_cast<float>(ordered_bits(group.highest)), num_bits, mode, scale_dtype);
}

/// Grid of a float32 scale, and of a zero point where it is asymmetric, that are given rather than
/// measured. A scale below min_scale, infinite or NaN has no grid, nor has a zero point beyond the
/// ends of the codes: the scale is NaN then.
MOQ_HOST_DEVICE inline GridParams grid_of_scale(float scale, int num_bits,
                                                QuantMode mode = QuantMode::kSymmetric,
                                                std::int32_t zero_point = 0) {
  const GridRange range = grid_range(num_bits, mode);
  const bool in_range = scale >= min_scale(DType::kFloat32) &&
                        scale <= max_scale(DType::kFloat32) && zero_point >= range.qmin &&
                        zero_point <= range.qmax && (zero_point == 0 || !is_symmetric(mode));
  const float step = in_range ? scale : std::bit_cast<float>(kQuietNaNBits);
  return {step, 1.0F / step, in_range ? zero_point : 0, range};
}

/// The largest magnitudes of a group below and above 0, in which its statistics can be handed on:
/// of several parts of a group the larger ones are the whole group's. Symmetric: both are absmax.
struct GroupExtents {
  float below;
  float above;
};

/// As float32 without a sign. Compared as int32 bit patterns they are ordered as the magnitudes
/// are, NaN last: a maximum of them taken so loses no NaN.
MOQ_HOST_DEVICE inline GroupExtents extents_of(const GroupStatistics& group, QuantMode mode) {
  const std::int32_t lowest = is_symmetric(mode) ? group.highest : ordered_bits(group.lowest);
  return {std::bit_cast<float>(lowest & kMagnitudeMask), std::bit_cast<float>(group.highest)};
}

/// The statistics that a grid is made of, from a group's extents; their signs are ignored.
MOQ_HOST_DEVICE inline GroupStatistics statistics_of(const GroupExtents& group, QuantMode mode) {
  const std::int32_t highest = std::bit_cast<std::int32_t>(group.above) & kMagnitudeMask;
  const std::int32_t below = std::bit_cast<std::int32_t>(group.below) & kMagnitudeMask;
  // -below as ordered_bits has it, and 0 for 0.
  return {is_symmetric(mode) || below == 0 ? 0 : ordered_bits(below | ~kMagnitudeMask), highest};
}

/// True unless the group or the scale that the grid was asked for has none.
MOQ_HOST_DEVICE inline bool exists(const GridParams& grid) {
  return grid.scale == grid.scale;
}

/// The number, or the canonical quiet NaN for any NaN: processors make different ones.
MOQ_HOST_DEVICE inline float canonical(float value) {
  return value == value ? value : std::bit_cast<float>(kQuietNaNBits);
}

/// Code of one element of a group that has a grid. `uniform`, a multiple of 2^-16 in [0, 1), is
/// used by stochastic rounding only: floor(position + uniform), of the exact sum, so that an
/// element that lies a fraction f above a grid point is rounded up with probability f (to 2^-16,
/// never more), and one on a grid point stays there.
MOQ_HOST_DEVICE inline std::int32_t quantize_one(float value, const GridParams& grid,
                                                 Rounding rounding, float uniform) {
  if (grid.threshold >= 0.0F) {
    return fabsf(value) > grid.threshold ? (value < 0.0F ? -1 : 1) : 0;
  }
  const float position = value * grid.inverse_scale;
  float rounded;
  if (rounding == Rounding::kNearest) {
    rounded = rintf(position);  // half to even
  } else {
    const float whole = truncf(position);
    const float rest = position - whole;  // of the position's sign; exact, as is 1 - uniform
    rounded = whole + (rest >= 1.0F - uniform ? 1.0F : 0.0F) - (rest < -uniform ? 1.0F : 0.0F);
  }
  rounded += static_cast<float>(grid.zero_point);
  return static_cast<std::int32_t>(smaller(larger(rounded, static_cast<float>(grid.range.qmin)),
                                           static_cast<float>(grid.range.qmax)));
}

/// The real number that a code stands for, in float32; storing it in a 16-bit dtype rounds once.
MOQ_HOST_DEVICE inline float dequantize_one(std::int32_t code, const GridParams& grid) {
  return static_cast<float>(code - grid.zero_point) * grid.scale;
}

}  // namespace moq
