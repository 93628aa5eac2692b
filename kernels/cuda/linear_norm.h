#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.h"
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

/// The sum of values, each half of which is added to the other, and so on; they are overwritten.
template <int kCount>
__device__ float sum_of(float (&values)[kCount]) {
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      values[i] += values[i + width];
    }
  }
  return values[0];
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
    sum += sum_of(x);
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

// ---- The same by all warps of a block, or of a cluster of them, in one pass and one exchange.

/// What the warps of a block, and the blocks of a cluster, know of the rows that they normalise.
template <int kWarps>
struct NormShared {
  /// Of each warp's columns: their sum, the sum of their squared differences from their mean, that
  /// mean, and their number. (One more, so that lanes that read those of all rows meet all banks.)
  float4 parts[kNormTokens][kWarps + 1];
  alignas(8) Moments moments[kNormTokens];  ///< of the block's columns
};

/// Adds numbers to a sum, and their squares to another.
__device__ inline void add_moments(const float (&x)[kChunk], float& sum, float& squares) {
  float sums[kChunk / 2];
  float products[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    sums[i] = x[i] + x[i + kChunk / 2];
    products[i] = fmaf(x[i], x[i], x[i + kChunk / 2] * x[i + kChunk / 2]);
  }
  sum += sum_of(sums);
  squares += sum_of(products);
}

/// What NormShared tells of a warp's columns, of the lanes' sums of differences from a pivot and of
/// their squares; for an RMS norm of numbers and their squares, about zero. The pivot is the
/// middle one of three of the numbers: neither a large mean nor an outlier drowns the variance.
__device__ inline float4 warp_part(bool centres, float pivot, float sum, float squares, float cols,
                                   float inverse_cols) {
  if (!centres) {
    return {0.0F, warp_sum(squares), 0.0F, cols};
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, distance);
    squares += __shfl_xor_sync(0xffffffffU, squares, distance);
  }
  const float mean = sum * inverse_cols;
  return {fmaf(pivot, cols, sum), fmaf(-sum, mean, squares), pivot + mean, cols};
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// Moments of whole rows from those of the columns of each block of a cluster, cols_of(rank) of
/// them: lane i of a warp gets those of row i < m. All blocks wait_for_cluster() before they end.
template <typename ColsOf>
__device__ Moments merge_moments(int m, int split, float inverse_k, const ColsOf& cols_of,
                                 const Moments* moments) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Moments own{0.0F, 0.0F};
  synchronize_cluster();
  for (int token = 0; token < m; ++token) {
    Moments theirs{0.0F, 0.0F};
    float count = 0.0F;
    if (lane < split) {
      const float2 pair = load_from_cluster(reinterpret_cast<const float2*>(&moments[token]), lane);
      theirs = {pair.x, pair.y};
      count = static_cast<float>(cols_of(lane));
    }
    const float mean = warp_sum(count * theirs.mean) * inverse_k;
    const float difference = theirs.mean - mean;
    const float squares = warp_sum(theirs.squares + count * (difference * difference));
    if (lane == token) {
      own = {mean, squares};
    }
  }
  arrive_at_cluster();  // has read what others keep for it until then
  return own;
}
#endif

/// Lane i of a warp gets the statistics of row i < m, from the parts that all warps have told. The
/// block has cols_of(its rank) columns.
template <int kWarps, typename ColsOf>
__device__ NormStatistics merge_parts(const DeviceNorm& norm, int m, int split, int rank,
                                      float inverse_k, const ColsOf& cols_of,
                                      NormShared<kWarps>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float4 parts[kWarps];
  float terms[kWarps];
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    parts[warp] = shared.parts[min(lane, m - 1)][warp];
    terms[warp] = parts[warp].x;
  }
  const float inverse_cols =
      split == 1 ? inverse_k : 1.0F / static_cast<float>(max(1, cols_of(rank)));
  const float mean = sum_of(terms) * inverse_cols;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float difference = parts[warp].z - mean;
    terms[warp] = fmaf(parts[warp].w * difference, difference, parts[warp].y);
  }
  Moments moments{mean, sum_of(terms)};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (split > 1) {
    if (static_cast<int>(threadIdx.x) < m) {
      shared.moments[lane] = moments;
    }
    moments = merge_moments(m, split, inverse_k, cols_of, shared.moments);
  }
#endif
  return {moments.mean, rsqrtf(fmaf(moments.squares, inverse_k, norm.epsilon))};
}

}  // namespace moq::kernels::cuda
