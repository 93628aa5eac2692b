#pragma once

#include <cstdint>

#include "kernels/common/learned_scale_pieces.h"
#include "kernels/cuda/vectors.h"

/// What a thread does with the elements of a run, for learned_scale.cu. Device code only.
namespace moq::kernels::cuda {
namespace {

struct Quotient {
  std::int64_t whole;
  std::int64_t rest;
};

/// a / b of numbers >= 0, in 32 bits where they have no more: 64 take a hundred instructions.
__device__ Quotient divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) {
    const auto quotient = static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
    return {quotient, a - quotient * b};
  }
  return {a / b, a % b};
}

/// The grid of one group, and the direction of its step size.
struct Group {
  float inverse_scale;
  float qmax;
  float direction;
};

template <Derivative kDerivative>
__device__ Group load_group(const LearnedScaleCall& call, std::int64_t group,
                            const LearnedWidth& width) {
  const GridParams grid = learned_grid(call.matrix, group, width);
  const float direction = kDerivative == Derivative::kTangent
                              ? by_absmax(call.absmax_tangent[group], call.matrix, group, width)
                              : 0.0F;
  return {grid.inverse_scale, static_cast<float>(grid.range.qmax), direction};
}

/// An element of what is written; `addend` is what it adds to the sums.
template <Derivative kDerivative>
__device__ float derive(float weight, float input, const Group& group, const LearnedWidth& width,
                        float& addend) {
  addend = 0.0F;
  if (width.copies()) {
    return input;
  }
  const float position = weight * group.inverse_scale;
  const float rounded = rintf(position);
  const bool inside = fabsf(rounded) <= group.qmax;
  const float below = position < 0.0F ? -group.qmax : position;  // or a NaN
  const float slope = inside ? rounded - position : (position > 0.0F ? group.qmax : below);
  const float through_grid = input * (inside ? 1.0F : 0.0F);
  const float result =
      width.blend == 0.0F ? through_grid : input * width.blend + through_grid * width.grid_share;
  if constexpr (kDerivative == Derivative::kTangent) {
    return result + slope * group.direction;
  }
  addend = input * slope;
  return result;
}

/// The sum of 64 numbers in halves, of which a lane has two neighbours, on lane 0.
__device__ float sum_in_halves(float2 own) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    own.x += __shfl_down_sync(0xffffffffU, own.x, distance);
    own.y += __shfl_down_sync(0xffffffffU, own.y, distance);
  }
  return own.x + own.y;
}

template <typename Element>
__device__ bool holds_pairs(const Element* address) {
  return reinterpret_cast<std::uintptr_t>(address) % (2 * sizeof(Element)) == 0;
}

/// Two neighbouring elements; those from `count` on are 0.
template <typename Element>
__device__ float2 load_two(const Element* address, int count, bool as_pair) {
  if (as_pair) {
    const Numbers<2> numbers = numbers_of(load_vector<2>(address));
    return {numbers.unit[0], numbers.unit[1]};
  }
  return {count > 0 ? number_of(address[0]) : 0.0F, count > 1 ? number_of(address[1]) : 0.0F};
}

template <typename Element>
__device__ void store_two(Element* address, int count, bool as_pair, float2 numbers) {
  if (as_pair) {
    store_vector(address, rounded<Element>(Numbers<2>{{numbers.x, numbers.y}}));
    return;
  }
  if (count > 0) {
    round_to_element(numbers.x, address[0]);
  }
  if (count > 1) {
    round_to_element(numbers.y, address[1]);
  }
}

}  // namespace
}  // namespace moq::kernels::cuda
