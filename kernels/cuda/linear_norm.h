#pragma once

#include <cstdint>

#include "kernels/common/half.h"
#include "kernels/linear.h"

/// The normalisation of the input of a linear kernel, up to kNormTokens rows of it. Device code
/// only.
namespace moq::kernels::cuda {

constexpr int kNormTokens = 8;
constexpr int kNormChunk = 8;  // neighbouring elements that a lane reads

/// Means and sums of squared differences from them, of the parts of rows that warps looked at.
template <int kWarps>
struct NormParts {
  float mean[kNormTokens][kWarps];
  float squares[kNormTokens][kWarps];
};

struct NormStatistics {
  float mean = 0.0F;
  float inverse = 0.0F;  ///< 1 / sqrt(variance + epsilon)
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, distance);
  }
  return value;
}

/// The rows of the input, shared by the warps of a block.
template <typename Element, int kWarps>
class NormReader {
 public:
  __device__ NormReader(const DeviceLinearArgs& args, int k) : args_(args), k_(k) {
    while (parts_ * 2 * static_cast<int>(args.m) <= kWarps) {
      parts_ *= 2;
    }
    part_cols_ = (k + parts_ * kNormChunk - 1) / (parts_ * kNormChunk) * kNormChunk;
    whole_ = args.input_stride % kNormChunk == 0 &&
             reinterpret_cast<std::uintptr_t>(args.input) % alignof(Chunk) == 0;
  }

  /// What this warp is to look at. The block is to be synchronized before `statistics`.
  __device__ void reduce(int warp, int lane, NormParts<kWarps>& shared) const {
    const int part = warp % parts_;
    const int cols = cols_of(part);
    for (int token = warp / parts_; token < args_.m; token += kWarps / parts_) {
      const Element* row =
          static_cast<const Element*>(args_.input) + token * args_.input_stride + part * part_cols_;
      // Twice over what the first-level cache holds by then: no large mean drowns the variance.
      float mean = 0.0F;
      if (args_.norm.kind == NormKind::kLayerNorm) {
        mean = warp_sum(sum(row, cols, lane, [](float x) { return x; })) /
               static_cast<float>(cols > 0 ? cols : 1);
      }
      const float squares = warp_sum(sum(row, cols, lane, [mean](float x) {
        const float difference = x - mean;
        return difference * difference;
      }));
      if (lane == 0) {
        shared.mean[token][part] = mean;
        shared.squares[token][part] = squares;
      }
    }
  }

  __device__ NormStatistics statistics(int token, const NormParts<kWarps>& shared) const {
    float sum = 0.0F;
    for (int part = 0; part < parts_; ++part) {
      sum += static_cast<float>(cols_of(part)) * shared.mean[token][part];
    }
    NormStatistics result{.mean = sum / static_cast<float>(k_)};
    float squares = 0.0F;
    for (int part = 0; part < parts_; ++part) {
      const float difference = shared.mean[token][part] - result.mean;
      squares += shared.squares[token][part] +
                 static_cast<float>(cols_of(part)) * (difference * difference);
    }
    result.inverse = 1.0F / sqrtf(squares / static_cast<float>(k_) + args_.norm.epsilon);
    return result;
  }

 private:
  struct alignas(16) Chunk {
    Element element[kNormChunk];
  };

  __device__ int cols_of(int part) const { return max(0, min(part_cols_, k_ - part * part_cols_)); }

  /// The lane's share of the sum of f over columns of a row.
  template <typename Function>
  __device__ float sum(const Element* row, int cols, int lane, const Function& f) const {
    float result = 0.0F;
    for (int col = lane * kNormChunk; col < cols; col += 32 * kNormChunk) {
      if (whole_ && col + kNormChunk <= cols) {
        const Chunk chunk = *reinterpret_cast<const Chunk*>(row + col);
#pragma unroll
        for (int i = 0; i < kNormChunk; ++i) {
          result += f(to_float(chunk.element[i]));
        }
      } else {
        for (int i = col; i < min(col + kNormChunk, cols); ++i) {
          result += f(to_float(row[i]));
        }
      }
    }
    return result;
  }

  const DeviceLinearArgs& args_;
  int k_;
  int parts_ = 1;  ///< of a row
  int part_cols_;
  bool whole_;  ///< whether chunks are aligned
};

/// An element of a row as it is multiplied, before it is rounded to dtype.
__device__ inline float normalise(const DeviceNorm& norm, const NormStatistics& statistics, float x,
                                  std::int64_t col) {
  const float value = (x - statistics.mean) * statistics.inverse * norm.weight[col];
  return norm.bias == nullptr ? value : value + norm.bias[col];
}

}  // namespace moq::kernels::cuda
