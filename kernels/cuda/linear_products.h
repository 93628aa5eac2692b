#pragma once

#include <cstdint>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/ptx.h"

/// The products of linear_stream.cu: blocks of a weight times up to eight tokens, both in shared
/// memory. Device code only.
namespace moq::kernels::cuda {

template <bool kBFloat16, int kElementBytes>
class Products {
 public:
  static constexpr int kBlockCols = kBlockBytes / kBlockRows / kElementBytes;
  float sums[2][4];  ///< of a block's halves, or of blocks in turn

  /// `first` is the address of the warp's first column of the first token, `zeros` that of 16 bytes
  /// of them; tokens are `stride` elements apart.
  __device__ Products(std::uint32_t first, int stride, int m, int lane, std::uint32_t zeros)
      : lane_bytes_(lane * 16), zeros_(zeros) {
    // The matrices that the lane gives are 32 columns, or 16 of two-byte elements. A column of B
    // that is no token may hold anything: its results are not read.
    const int token = lane % 8 < m ? lane % 8 : 0;
    const int chunk = lane / 8 % (4 / kElementBytes);
    input_ = first + (token * stride + chunk * 8) * 2;
    compute_now(lane_bytes_);
    compute_now(zeros_);
    compute_now(input_);
  }

  __device__ void clear() {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[0][e] = sums[1][e] = 0.0F;
    }
  }

  /// Adds the products of blocks [begin, end) of a piece at `held`, whose first is the first-th of
  /// the warp's. They are taken by kBatch, without a branch between them: in place of one behind
  /// the end, the last is multiplied by zero.
  template <int kBatch>
  __device__ void add(std::uint32_t held, int begin, int end, int first,
                      const std::uint32_t (&zero)[2]) {
#pragma unroll 1
    for (int j = begin; j < end; j += kBatch) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool exists = j + b < end;
        const uint4 bytes =
            load_shared_quad(held + lane_bytes_ + (exists ? j + b : end - 1) * kBlockBytes);
        std::uint32_t a[3 - kElementBytes][4];
        fragments<kBFloat16, kElementBytes>(bytes, zero, a);
        std::uint32_t x[4 / kElementBytes];
        load_matrices(exists ? input_ + (first + j + b) * kBlockCols * 2 : zeros_, x);
        if constexpr (kElementBytes == 1) {
          multiply_accumulate<kBFloat16>(sums[0], a[0], x[0], x[1]);
          multiply_accumulate<kBFloat16>(sums[1], a[1], x[2], x[3]);
        } else {
          multiply_accumulate<kBFloat16>(sums[b % 2], a[0], x[0], x[1]);
        }
      }
    }
  }

 private:
  int lane_bytes_;
  std::uint32_t zeros_;
  std::uint32_t input_;
};

}  // namespace moq::kernels::cuda
