#pragma once

#include <cstdint>

#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/group_grids.h"
#include "kernels/cpu/simd/vector.h"
#include "kernels/grid_search.h"

/// grid_search.h's sweeps on vectors: the same terms, hence the same sums.
namespace moq::kernels::cpu::MOQ_ISA {

/// One vector of elements' sweeps.
struct VectorSweep {
  F32 to_unit;
  F32 threshold;
  VectorGrid grid;
};

/// The terms of elements, at most 2^30, and how many (0 or 1) each of them counts for.
template <bool kSquaredError>
[[gnu::always_inline]] inline I32 sweep_terms(F32 value, const VectorSweep& sweep, I32& counted) {
  const F32 magnitude = absolute(value);
  const auto counts = magnitude > sweep.threshold;
  counted = counts ? broadcast(1) : I32{};
  F32 exact = magnitude;
  if constexpr (kSquaredError) {
    exact = absolute(value - dequantize(quantize_nearest(value, sweep.grid), sweep.grid));
  }
  const F32 units = minimum(round_nearest(exact * sweep.to_unit),
                            broadcast(kSquaredError ? kLargestError : kLargestMagnitude));
  const I32 terms = convert<I32>(counts ? units : F32{});
  return kSquaredError ? terms * terms : terms;
}

/// Vectors' worth of terms whose halves can be added up in 32 bits.
constexpr std::int64_t kSweepFlush = 1 << 15;

/// Sums of one group's elements that lie one behind the other.
template <bool kSquaredError, typename Element>
inline SweepSums sweep_elements(const Element* input, std::int64_t size, const Sweep& sweep) {
  const VectorSweep vector{
      broadcast(sweep.to_unit),
      broadcast(sweep.threshold),
      {broadcast(sweep.grid.scale), broadcast(sweep.grid.inverse_scale),
       broadcast(static_cast<float>(sweep.grid.zero_point)),
       broadcast(static_cast<float>(sweep.grid.range.qmin)),
       broadcast(static_cast<float>(sweep.grid.range.qmax)), broadcast(sweep.grid.threshold)}};
  SweepSums sums;
  std::int64_t i = 0;
  while (i + kWidth <= size) {
    I32 low{};
    I32 high{};
    I32 count{};
    for (std::int64_t n = 0; n < kSweepFlush && i + kWidth <= size; ++n, i += kWidth) {
      I32 counted;
      const I32 terms = sweep_terms<kSquaredError>(load(input + i), vector, counted);
      low += terms & 0x7fff;
      high += terms >> 15;
      count += counted;
    }
    std::int32_t lanes[3][kWidth];
    std::memcpy(lanes[0], &low, sizeof(low));
    std::memcpy(lanes[1], &high, sizeof(high));
    std::memcpy(lanes[2], &count, sizeof(count));
    for (int lane = 0; lane < kWidth; ++lane) {
      sums.sum += lanes[0][lane] + (std::int64_t{lanes[1][lane]} << 15);
      sums.count += lanes[2][lane];
    }
  }
  for (; i < size; ++i) {
    add(sums, sweep, to_float(input[i]));
  }
  return sums;
}

template <typename Element>
inline SweepSums sweep_run(const Element* input, std::int64_t size, const Sweep& sweep) {
  return sweep.squared_error ? sweep_elements<true>(input, size, sweep)
                             : sweep_elements<false>(input, size, sweep);
}

/// Sweeps of up to GroupGrids::kCapacity groups, element i of each array belonging to group i.
struct LaneSweeps {
  alignas(64) float to_unit[GroupGrids::kCapacity + kWidth] = {};
  alignas(64) float threshold[GroupGrids::kCapacity + kWidth] = {};
  GroupGrids grids = {};
  bool squared_error = false;

  void set(int i, const Sweep& sweep) {
    to_unit[i] = sweep.to_unit;
    threshold[i] = sweep.threshold;
    grids.set(i, sweep.grid);
    squared_error = sweep.squared_error;
  }
};

/// Adds what `lanes` neighbouring rows have in the columns [begin, end) to their sums.
template <bool kSquaredError, typename Input>
inline void sweep_columns(const Input* input, std::int64_t col_stride, std::int64_t begin,
                          std::int64_t end, std::int64_t lanes, const LaneSweeps& sweeps,
                          SweepSums* sums) {
  constexpr int kSize = GroupGrids::kCapacity + kWidth;
  const LaneGrids grids(sweeps.grids);
  for (std::int64_t first = begin; first < end; first += kSweepFlush) {
    const std::int64_t last = first + kSweepFlush < end ? first + kSweepFlush : end;
    std::int32_t low[kSize] = {};
    std::int32_t high[kSize] = {};
    std::int32_t count[kSize] = {};
    const auto add_to = [](std::int32_t* array, I32 terms) MOQ_INLINE_LAMBDA {
      const I32 total = load_bits<I32>(array) + terms;
      std::memcpy(array, &total, sizeof(total));
    };
    for (std::int64_t col = first; col < last; ++col) {
      for_each_vector<
          false>(input, lanes, [&](std::int64_t i, std::int64_t width) MOQ_INLINE_LAMBDA {
        const VectorSweep sweep{load(sweeps.to_unit + i), load(sweeps.threshold + i), grids.at(i)};
        I32 counted;
        const I32 terms = sweep_terms<kSquaredError>(load_some(input + col * col_stride + i, width),
                                                     sweep, counted);
        add_to(low + i, terms & 0x7fff);
        add_to(high + i, terms >> 15);
        add_to(count + i, counted);
      });
    }
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      sums[lane].sum += low[lane] + (std::int64_t{high[lane]} << 15);
      sums[lane].count += count[lane];
    }
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
