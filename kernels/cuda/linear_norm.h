#pragma once

#include <cstdint>

#include "kernels/linear.h"

/// The normalisation of the input of a linear kernel, up to kNormTokens rows of it. Device code
/// only.
namespace moq::kernels::cuda {

constexpr int kNormTokens = 8;
constexpr int kChunk = 8;  // neighbouring elements that a lane reads

/// Of some columns of a row: their mean (0 for an RMS norm) and the sum of the squared differences
/// from it.
struct Moments {
  float mean;
  float squares;
};

struct NormStatistics {
  float mean;
  float inverse;  ///< 1 / sqrt(variance + epsilon)
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, distance);
  }
  return value;
}

/// A lane's share of the sum of f over `cols` numbers: read(first, x) gives a chunk.
template <typename Read, typename Function>
__device__ float lane_sum(int cols, int lane, const Read& read, const Function& f) {
  float sum = 0.0F;
  for (int first = lane * kChunk; first < cols; first += 32 * kChunk) {
    float x[kChunk];
    read(first, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[i] = first + i < cols ? f(x[i]) : 0.0F;
    }
#pragma unroll
    for (int width = kChunk / 2; width > 0; width /= 2) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        x[i] += x[i + width];
      }
    }
    sum += x[0];
  }
  return sum;
}

/// Moments of numbers that a warp reads twice: no large mean drowns the variance.
template <typename Read>
__device__ Moments warp_moments(NormKind kind, int cols, int lane, const Read& read) {
  float mean = 0.0F;
  if (kind == NormKind::kLayerNorm) {
    mean = warp_sum(lane_sum(cols, lane, read, [](float x) { return x; })) /
           static_cast<float>(cols > 0 ? cols : 1);
  }
  const float squares = warp_sum(lane_sum(cols, lane, read, [mean](float x) {
    const float difference = x - mean;
    return difference * difference;
  }));
  return {mean, squares};
}

__device__ inline NormStatistics statistics_of(const DeviceNorm& norm, const Moments& moments,
                                               int cols) {
  return {moments.mean, rsqrtf(moments.squares / static_cast<float>(cols) + norm.epsilon)};
}

}  // namespace moq::kernels::cuda
