#pragma once

#include <bit>
#include <cstdint>

#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/philox.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/fake_quantize_tiles.h"
#include "kernels/fake_quantize.h"
#include "kernels/grid_search.h"

/// What a thread does with its part of a run, and how teams put together what they collected.
namespace moq::kernels::cuda {
namespace {

/// Four neighbouring elements of one row, or fewer at a row's end.
struct Quad {
  float value[kQuad];
};

/// The machine word that holds a quad of contiguous elements.
template <typename Element>
struct alignas(kQuad * sizeof(Element)) Packed {
  Element element[kQuad];
};

template <typename Element>
__device__ bool loads_packed(const Element* address, std::int64_t stride, int count) {
  return stride == 1 && count == kQuad &&
         reinterpret_cast<std::uintptr_t>(address) % sizeof(Packed<Element>) == 0;
}

/// Elements past `count` are 0, which changes no statistics.
template <typename Element>
__device__ Quad load_quad(const Element* address, std::int64_t stride, int count) {
  Quad quad{};
  if (loads_packed(address, stride, count)) {
    const auto packed = *reinterpret_cast<const Packed<Element>*>(address);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      quad.value[i] = to_float(packed.element[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < count) {
        quad.value[i] = to_float(address[i * stride]);
      }
    }
  }
  return quad;
}

template <typename Element>
__device__ void store_quad(Element* address, std::int64_t stride, int count, const Quad& quad) {
  if (loads_packed(address, stride, count)) {
    Packed<Element> packed;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      store_float(&packed.element[i], quad.value[i]);
    }
    *reinterpret_cast<Packed<Element>*>(address) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < count) {
        store_float(address + i * stride, quad.value[i]);
      }
    }
  }
}

/// Calls body(first column, number of columns) for the quads of a run that are this thread's.
template <typename Body>
__device__ void for_each_quad(const Place& place, const Body& body) {
  for (std::int64_t col = place.begin + std::int64_t{kQuad} * place.member; col < place.end;
       col += std::int64_t{kQuad} * place.members) {
    const std::int64_t left = place.end - col;
    body(col, left < kQuad ? static_cast<int>(left) : kQuad);
  }
}

__device__ void include(GroupStatistics& statistics, float value, QuantMode mode) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  if (is_symmetric(mode)) {
    statistics.highest = max(statistics.highest, bits & kMagnitudeMask);
  } else {
    statistics.lowest = min(statistics.lowest, ordered_bits(bits));
    statistics.highest = max(statistics.highest, ordered_bits(bits));
  }
}

/// Statistics of this thread's part of a run.
__device__ GroupStatistics own_statistics(const FakeQuantizeTensor& matrix, const Place& place) {
  GroupStatistics statistics;
  visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
    const Input* row = static_cast<const Input*>(matrix.input) + place.row * matrix.row_stride;
    for_each_quad(place, [&](std::int64_t col, int count) {
      const Quad quad = load_quad(row + col * matrix.col_stride, matrix.col_stride, count);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        include(statistics, quad.value[i], matrix.mode);
      }
    });
  });
  return statistics;
}

__device__ GroupStatistics reduce_warp(GroupStatistics statistics) {
  constexpr unsigned kAllLanes = 0xffffffffU;
  return {__reduce_min_sync(kAllLanes, statistics.lowest),
          __reduce_max_sync(kAllLanes, statistics.highest)};
}

__device__ SweepSums reduce_warp(SweepSums sums) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    sums.sum += __shfl_xor_sync(0xffffffffU, sums.sum, offset);
    sums.count += __shfl_xor_sync(0xffffffffU, sums.count, offset);
  }
  return sums;
}

__device__ GroupStatistics merge(const GroupStatistics& a, const GroupStatistics& b) {
  return {min(a.lowest, b.lowest), max(a.highest, b.highest)};
}

__device__ SweepSums merge(const SweepSums& a, const SweepSums& b) {
  return {a.sum + b.sum, a.count + b.count};
}

/// Merges what each thread has collected over the whole team. Every thread of the block takes part,
/// active or not.
template <typename Collected>
__device__ Collected reduce_team(const Tiling& tiling, Collected collected) {
  __shared__ Collected shared[kWarps][kWarpSize];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (tiling.team != Team::kLane) {
    collected = reduce_warp(collected);
    if (tiling.warps == 1) {
      return collected;
    }
  }
  shared[warp][lane] = collected;
  __syncthreads();
  const int first = warp - warp % tiling.warps;
  collected = shared[first][lane];
  for (int other = 1; other < tiling.warps; ++other) {
    collected = merge(collected, shared[first + other][lane]);
  }
  __syncthreads();  // the next reduction writes `shared` again
  return collected;
}

/// Uniforms of the quad whose first element has number `element` in the parameter.
__device__ Quad draw_quad(std::uint64_t element, std::uint32_t step, std::uint32_t name_hash,
                          std::uint64_t seed) {
  const auto block_of = [&](std::uint64_t block) {
    return philox4x32({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                        step, name_hash}},
                      seed);
  };
  const auto shift = static_cast<int>(element % kPhiloxHalves);
  const PhiloxBlock first = block_of(element / kPhiloxHalves);
  const PhiloxBlock second =
      shift + kQuad <= kPhiloxHalves ? first : block_of(element / kPhiloxHalves + 1);
  Quad quad;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    std::uint32_t half = 0;
#pragma unroll
    for (int j = 0; j < kPhiloxHalves + kQuad - 1; ++j) {  // (first, second)[i + shift], unrolled:
      if (j == i + shift) {                                // registers have no index
        half = j < kPhiloxHalves ? half_of(first, j) : half_of(second, j - kPhiloxHalves);
      }
    }
    quad.value[i] = static_cast<float>(half) * 0x1p-16F;
  }
  return quad;
}

/// This thread's part of a run in a sweep.
__device__ SweepSums own_sums(const FakeQuantizeTensor& matrix, const Place& place,
                              const Sweep& sweep) {
  SweepSums sums;
  visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
    const Input* row = static_cast<const Input*>(matrix.input) + place.row * matrix.row_stride;
    for_each_quad(place, [&](std::int64_t col, int count) {
      const Quad quad = load_quad(row + col * matrix.col_stride, matrix.col_stride, count);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (i < count) {
          add(sums, sweep, quad.value[i]);
        }
      }
    });
  });
  return sums;
}

__device__ bool has_grid(const FakeQuantizeTensor& matrix, int num_bits) {
  const int most = matrix.codes != nullptr && matrix.codes_dtype == DType::kInt8 ? 8 : kMaxBits;
  return num_bits >= min_bits(matrix.mode) && num_bits <= most;
}

__device__ GridParams no_grid() {
  const float nan = std::bit_cast<float>(kQuietNaNBits);
  return {nan, nan, 0, {0, 0}};
}

__device__ void store_parameters(const FakeQuantizeTensor& matrix, const GridParams& grid,
                                 std::int64_t group) {
  if (matrix.scales != nullptr) {
    visit_float(matrix.scale_dtype, [&]<typename Scale>(Scale) {
      store_float(static_cast<Scale*>(matrix.scales) + group, grid.scale);
    });
  }
  if (matrix.zero_points != nullptr) {
    matrix.zero_points[group] = grid.zero_point;
  }
}

__device__ void store_code(const FakeQuantizeTensor& matrix, std::int64_t place,
                           std::int32_t code) {
  if (matrix.codes_dtype == DType::kInt8) {
    static_cast<std::int8_t*>(matrix.codes)[place] = static_cast<std::int8_t>(code);
  } else {
    static_cast<std::int16_t*>(matrix.codes)[place] = static_cast<std::int16_t>(code);
  }
}

/// Quantizes this thread's part of a run, or copies it when num_bits is 0.
template <typename Input, typename Output>
__device__ void write_run(const FakeQuantizeTensor& matrix, const Place& place, int num_bits,
                          float blend_ratio, std::uint64_t seed, std::uint32_t step,
                          const GridParams& grid) {
  const std::int64_t first = place.row * matrix.row_stride;
  const Input* input = static_cast<const Input*>(matrix.input) + first;
  Output* output = matrix.output == nullptr ? nullptr : static_cast<Output*>(matrix.output) + first;
  const std::int64_t pitch = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  const float nan = std::bit_cast<float>(kQuietNaNBits);
  for_each_quad(place, [&](std::int64_t col, int count) {
    Quad quad = load_quad(input + col * matrix.col_stride, matrix.col_stride, count);
    if (num_bits != 0) {
      Quad uniform{};
      if (matrix.rounding == Rounding::kStochastic) {
        const std::int64_t element = matrix.first_element + place.row * pitch + col;
        uniform = draw_quad(static_cast<std::uint64_t>(element), step, matrix.name_hash, seed);
      }
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const bool exists = grid.scale == grid.scale;
        const std::int32_t code =
            exists ? quantize_one(quad.value[i], grid, matrix.rounding, uniform.value[i]) : 0;
        if (matrix.codes != nullptr && i < count) {
          store_code(matrix, place.row * matrix.cols + col + i, code);
        }
        float result = dequantize_one(code, grid);
        if (blend_ratio != 0.0F) {
          result = blend_ratio * quad.value[i] + (1.0F - blend_ratio) * result;
        }
        quad.value[i] = exists ? result : nan;
      }
    }
    if (output != nullptr) {
      store_quad(output + col * matrix.col_stride, matrix.col_stride, count, quad);
    }
  });
}

}  // namespace
}  // namespace moq::kernels::cuda
