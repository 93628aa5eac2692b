#pragma once

#include <cstdint>

#include "kernels/cpu/simd/statistics.h"
#include "kernels/cpu/simd/vector.h"
#include "kernels/quant_grid.h"

/// The arithmetic of quant_grid.h on vectors: the same operations in the same order, so the same
/// bits. Codes stay in float32 until they are stored, where integers up to 2^24 are exact.
namespace moq::kernels::cpu::MOQ_ISA {

/// Grids of up to kCapacity groups, element i of each array belonging to group i; a vector may be
/// loaded from any of them.
struct GroupGrids {
  static constexpr int kCapacity = 256;
  alignas(64) float scale[kCapacity + kWidth];
  alignas(64) float inverse_scale[kCapacity + kWidth];
  alignas(64) float zero_point[kCapacity + kWidth];
  alignas(64) float threshold[kCapacity + kWidth];
  float qmin;
  float qmax;

  /// Takes over one group's grid, found otherwise; all have one range.
  void set(int i, const GridParams& grid) {
    scale[i] = grid.scale;
    inverse_scale[i] = grid.inverse_scale;
    zero_point[i] = static_cast<float>(grid.zero_point);
    threshold[i] = grid.threshold;
    qmin = static_cast<float>(grid.range.qmin);
    qmax = static_cast<float>(grid.range.qmax);
  }
};

/// Statistics of up to as many groups; the ones past `count` must be initialised too.
struct GroupStatisticsArrays {
  alignas(64) std::int32_t lowest[GroupGrids::kCapacity] = {};
  alignas(64) std::int32_t highest[GroupGrids::kCapacity] = {};
};

[[gnu::always_inline]] inline F32 round_lanes_to(F32 value, DType dtype) {
  if (dtype == DType::kFloat16) {
    Float16 stored[kWidth];
    store(stored, value);
    return load(stored);
  }
  if (dtype == DType::kBFloat16) {
    BFloat16 stored[kWidth];
    store(stored, value);
    return load(stored);
  }
  return value;
}

/// make_grid of quant_grid.h for the first `count` groups (and some past them).
inline void make_grids(const GroupStatisticsArrays& groups, int count, int num_bits, QuantMode mode,
                       DType scale_dtype, GroupGrids& grids) {
  const GridRange range = grid_range(num_bits, mode);
  grids.qmin = static_cast<float>(range.qmin);
  grids.qmax = static_cast<float>(range.qmax);
  const bool symmetric = is_symmetric(mode);
  const F32 levels =
      broadcast(static_cast<float>(symmetric ? range.qmax : range.qmax - range.qmin));
  const F32 nan = bit_cast<F32>(broadcast(kQuietNaNBits));
  for (int i = 0; i < count; i += kWidth) {
    const I32 lowest = load_bits<I32>(groups.lowest + i);
    const I32 highest = load_bits<I32>(groups.highest + i);
    const F32 lo = bit_cast<F32>(ordered_lanes(lowest));
    const F32 hi = bit_cast<F32>(ordered_lanes(highest));
    const F32 extent = symmetric ? maximum(absolute(lo), absolute(hi)) : hi - lo;
    const F32 scale = minimum(
        maximum(round_lanes_to(extent / levels, scale_dtype), broadcast(min_scale(scale_dtype))),
        broadcast(max_scale(scale_dtype)));
    const F32 inverse_scale = 1.0F / scale;
    F32 zero_point{};
    if (!symmetric) {
      const F32 exact = grids.qmin - lo * inverse_scale;
      zero_point =
          minimum(maximum(round_nearest(exact), broadcast(grids.qmin)), broadcast(grids.qmax));
    }
    const I32 lowest_finite = broadcast(kLowestFiniteBits);
    const I32 largest_finite = broadcast(kInfinityBits - 1);
    const auto finite = (lowest >= lowest_finite) & (highest <= largest_finite);
    store(grids.scale + i, finite ? scale : nan);
    store(grids.inverse_scale + i, finite ? inverse_scale : nan);
    store(grids.zero_point + i, finite ? zero_point : F32{});
  }
}

/// The grid that one vector of elements is quantized by.
struct VectorGrid {
  F32 scale;
  F32 inverse_scale;
  F32 zero_point;
  F32 qmin;
  F32 qmax;
  F32 threshold{};  ///< of sign codes
};

/// All elements belong to one group.
class SharedGrid {
 public:
  SharedGrid(const GroupGrids& grids, int group)
      : grid_{broadcast(grids.scale[group]),
              broadcast(grids.inverse_scale[group]),
              broadcast(grids.zero_point[group]),
              broadcast(grids.qmin),
              broadcast(grids.qmax),
              broadcast(grids.threshold[group])} {}
  [[gnu::always_inline]] VectorGrid at(std::int64_t /*element*/) const { return grid_; }

 private:
  VectorGrid grid_;
};

/// Element i belongs to group i.
class LaneGrids {
 public:
  explicit LaneGrids(const GroupGrids& grids) : grids_(grids) {}
  [[gnu::always_inline]] VectorGrid at(std::int64_t element) const {
    return {load(grids_.scale + element),
            load(grids_.inverse_scale + element),
            load(grids_.zero_point + element),
            broadcast(grids_.qmin),
            broadcast(grids_.qmax),
            load(grids_.threshold + element)};
  }

 private:
  const GroupGrids& grids_;
};

/// Codes (as float32) of elements that are rounded to the nearest grid point.
[[gnu::always_inline]] inline F32 quantize_nearest(F32 value, const VectorGrid& grid) {
  const F32 rounded = round_nearest(value * grid.inverse_scale) + grid.zero_point;
  return minimum(maximum(rounded, grid.qmin), grid.qmax);
}

/// Codes (as float32) of elements that are rounded stochastically, by their draws in units of
/// 2^-16: the whole part of the exact sum of position and draw.
[[gnu::always_inline]] inline F32 quantize_stochastic(F32 value, const VectorGrid& grid,
                                                      I32 draws) {
  const F32 position = value * grid.inverse_scale;
#if defined(MOQ_ISA_avx512)
  // A sum that is rounded down has the same whole part.
  const F32 rounded =
      round_down(_mm512_fmadd_round_ps(convert<F32>(draws), broadcast(0x1p-16F), position,
                                       _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#else
  const F32 uniform = convert<F32>(draws) * 0x1p-16F;
  const F32 whole = round_to_zero(position);
  const F32 rest = position - whole;  // of the position's sign; exact, as is 1 - uniform
  const F32 one = broadcast(1.0F);
  const F32 rounded =
      whole + (rest >= 1.0F - uniform ? one : F32{}) - (rest < -uniform ? one : F32{});
#endif
  return minimum(maximum(rounded + grid.zero_point, grid.qmin), grid.qmax);
}

/// Sign codes (as float32) of elements.
[[gnu::always_inline]] inline F32 quantize_sign(F32 value, const VectorGrid& grid) {
  const F32 sign = value < 0.0F ? broadcast(-1.0F) : broadcast(1.0F);
  return absolute(value) > grid.threshold ? sign : F32{};
}

[[gnu::always_inline]] inline F32 dequantize(F32 code, const VectorGrid& grid) {
  return (code - grid.zero_point) * grid.scale;
}

}  // namespace moq::kernels::cpu::MOQ_ISA
