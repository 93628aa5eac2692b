#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/common/philox.h"
#include "kernels/cuda/fake_quantize_elements.h"
#include "kernels/cuda/vectors.h"
#include "kernels/fake_quantize.h"
#include "kernels/quant_grid.h"

/// The arithmetic of whole vectors. The bits are those of fake_quantize_elements.h, by instructions
/// that suit numbers without NaN.
namespace moq::kernels::cuda {
namespace {

/// The smallest and the largest number so far, 0 among them; a NaN if there is one.
struct Extent {
  float lowest = 0.0F;
  float highest = 0.0F;

  /// is_symmetric: only the largest magnitude counts.
  __device__ void include(float number, bool is_symmetric) {
    if (is_symmetric) {
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(highest) : "f"(fabsf(number)));
    } else {
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(highest) : "f"(number));
      asm("min.NaN.f32 %0, %0, %1;" : "+f"(lowest) : "f"(number));
    }
  }

  __device__ GroupStatistics statistics() const {
    return {ordered_bits(__float_as_int(lowest)), ordered_bits(__float_as_int(highest))};
  }
};

/// Added to a number of magnitude up to 2^22, rounds it to a whole one.
constexpr float kWhole = 0x1.8p23F;

/// A grid as a row's numbers need it.
struct RowGrid {
  float inverse_scale;
  float scale;    ///< NaN: there is none, and NaN is all that comes of it
  float lowest;   ///< code without zero point, plus kWhole
  float highest;  ///< likewise

  __device__ bool exists() const { return scale == scale; }
};

__device__ RowGrid row_grid(const GridParams& grid) {
  return {grid.inverse_scale, grid.scale,
          kWhole + static_cast<float>(grid.range.qmin - grid.zero_point),
          kWhole + static_cast<float>(grid.range.qmax - grid.zero_point)};
}

/// The draws of a matrix: blocks by their numbers' lower halves.
template <bool kStochastic>
class Draws {
 public:
  __device__ Draws(const FakeQuantizeTensor&, const PhiloxKeys&, std::uint32_t) {}
  __device__ PhiloxBlock block(std::uint32_t) const { return {}; }
};

template <>
class Draws<true> {
 public:
  /// keys: in the launch's parameters, operands of instructions.
  __device__ Draws(const FakeQuantizeTensor& matrix, const PhiloxKeys& keys, std::uint32_t step)
      : keys_(keys),
        start_(philox_start(static_cast<std::uint32_t>(matrix.first_element / kPhiloxHalves >> 32),
                            step, matrix.name_hash, keys)) {}

  __device__ PhiloxBlock block(std::uint32_t number) const {
    return philox4x32(number, start_, keys_);
  }

 private:
  const PhiloxKeys& keys_;
  PhiloxStart start_;
};

/// The draws of two vectors of four numbers each, `first` and `second`, neighbours of which lanes
/// that differ in their lowest bit hold: one of two lanes makes the block that the two first
/// vectors share, the other one that of the second ones. Whole warps take part.
template <typename Number>
__device__ void draw_pairs(const Draws<true>& draws, std::uint32_t first_block, Number first,
                           Number second, std::uint32_t (&words)[2][2]) {
  const bool odd = first % 2 != 0;
  const Number drawn = odd ? second : first;
  const PhiloxBlock own = draws.block(first_block + static_cast<std::uint32_t>(drawn / 2));
  const std::uint32_t passed[2] = {odd ? own.word[0] : own.word[2],
                                   odd ? own.word[1] : own.word[3]};
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const std::uint32_t got = __shfl_xor_sync(0xffffffffU, passed[w], 1);
    words[0][w] = odd ? got : own.word[w];
    words[1][w] = odd ? own.word[2 + w] : got;
  }
}

/// dequantize_one(quantize_one(number)): the numbers of a group that has a grid are finite, and
/// what is too large for kWhole is clamped. draw: half kHalf of a word, in units of 2^-16.
template <bool kStochastic, int kHalf>
__device__ float simulated(float number, const RowGrid& grid, std::uint32_t word) {
  const float position = number * grid.inverse_scale;
  float rounded;
  if constexpr (kStochastic) {
    // 2^23 and the draw, whose bytes are the lowest of the number's.
    const auto draw =
        __uint_as_float(__byte_perm(word, 0x4b000000U, kHalf == 0 ? 0x7610U : 0x7632U));
    const float sum = __fmaf_rd(draw, 0x1p-16F, position);  // 128 too much; of the same whole part
    rounded = __fadd_rd(sum, kWhole - 128.0F);
  } else {
    rounded = position + kWhole;  // half to even
  }
  rounded = fminf(fmaxf(rounded, grid.lowest), grid.highest);
  return (rounded - kWhole) * grid.scale;
}

/// Numbers with canonical NaN among them, which the processor's conversions do not make.
template <typename Output, int kWidth>
__device__ Vector<Output, kWidth> rounded_with_nan(const Numbers<kWidth>& numbers) {
  Output elements[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    store_float(&elements[i], canonical(numbers.unit[i]));
  }
  Vector<Output, kWidth> vector;
  memcpy(&vector, elements, sizeof(vector));
  return vector;
}

/// Writes what is simulated of some numbers. is_usual: without blending, and every grid exists.
template <typename Output, int kWidth>
__device__ void write(float blend_ratio, bool is_usual, const Numbers<kWidth>& numbers,
                      Numbers<kWidth> results, Output* output) {
  if (is_usual) {
    store_vector(output, rounded<Output>(results));
    return;
  }
  if (blend_ratio != 0.0F) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      results.unit[i] = blend_ratio * numbers.unit[i] + (1.0F - blend_ratio) * results.unit[i];
    }
  }
  store_vector(output, rounded_with_nan<Output>(results));
}

}  // namespace
}  // namespace moq::kernels::cuda
