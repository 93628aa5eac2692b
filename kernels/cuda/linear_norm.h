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

/// Of some columns of a row: the sum of their differences from the row's pivot, and of the squares
/// of these.
struct alignas(8) Differences {
  float sum;
  float squares;
};

/// What makes a row's normalised numbers of its differences: difference * inverse + start.
struct NormLine {
  float start;
  float inverse;  ///< 1 / sqrt(variance + epsilon)
};

/// What the warps of a block, and the blocks of a cluster, know of the rows that they normalise.
template <int kWarps>
struct NormShared {
  /// Of each warp's columns. (Two more, so that lanes that read those of all rows meet all banks.)
  alignas(16) Differences parts[kNormTokens][kWarps + 2];
  Differences sums[kNormTokens];  ///< of the block's columns
};

/// The middle one of three numbers: one of them may be an outlier.
__device__ inline float middle_of(float a, float b, float c) {
  return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

/// Adds a lane's differences, and their squares, to its totals.
__device__ inline void add_differences(const float (&x)[kChunk], Differences& total) {
  float sums[kChunk / 2];
  float products[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    sums[i] = x[i] + x[i + kChunk / 2];
    products[i] = fmaf(x[i], x[i], x[i + kChunk / 2] * x[i + kChunk / 2]);
  }
  total.sum += sum_of(sums);
  total.squares += sum_of(products);
}

/// The sums of all lanes'. For an RMS norm, which takes no mean, that of squares alone.
__device__ inline Differences warp_sums(bool centres, Differences own) {
  if (!centres) {
    return {0.0F, warp_sum(own.squares)};
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    own.sum += __shfl_xor_sync(0xffffffffU, own.sum, distance);
    own.squares += __shfl_xor_sync(0xffffffffU, own.squares, distance);
  }
  return own;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// Differences of whole rows, from those of the columns of each block of a cluster: lane i of a
/// warp gets those of row i < m. All blocks wait_for_cluster() before they end.
__device__ inline Differences sum_over_cluster(int m, int split, const Differences* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Differences own{0.0F, 0.0F};
  synchronize_cluster();
  for (int token = 0; token < m; ++token) {
    float2 theirs{0.0F, 0.0F};
    if (lane < split) {
      theirs = load_from_cluster(reinterpret_cast<const float2*>(&sums[token]), lane);
    }
    const Differences row{warp_sum(theirs.x), warp_sum(theirs.y)};
    if (lane == token) {
      own = row;
    }
  }
  arrive_at_cluster();  // has read what others keep for it until then
  return own;
}
#endif

/// Lane i of a warp gets the line of row i < m, from the parts that all warps have told.
template <int kWarps>
__device__ NormLine line_of(const DeviceNorm& norm, int m, int split, float inverse_k,
                            NormShared<kWarps>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  static_assert(kWarps % 2 == 0, "parts are read two by two");
  float sums[kWarps];
  float squares[kWarps];
#pragma unroll
  for (int warp = 0; warp < kWarps; warp += 2) {
    const auto two = *reinterpret_cast<const float4*>(&shared.parts[min(lane, m - 1)][warp]);
    sums[warp] = two.x;
    squares[warp] = two.y;
    sums[warp + 1] = two.z;
    squares[warp + 1] = two.w;
  }
  Differences row{sum_of(sums), sum_of(squares)};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (split > 1) {
    if (static_cast<int>(threadIdx.x) < m) {
      shared.sums[lane] = row;
    }
    row = sum_over_cluster(m, split, shared.sums);
  }
#endif
  const float mean = row.sum * inverse_k;
  const float variance = fmaf(row.squares, inverse_k, -mean * mean);
  const float inverse = rsqrtf((variance < 0.0F ? 0.0F : variance) + norm.epsilon);
  return {-mean * inverse, inverse};
}

}  // namespace moq::kernels::cuda
