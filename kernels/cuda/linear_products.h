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
  /// the warp's. They are taken two by two, the operands of the next two under way; in place of one
  /// behind the end, zeros are multiplied.
  __device__ void add(std::uint32_t held, int begin, int end, int first,
                      const std::uint32_t (&zero)[2]) {
    std::uint32_t block = held + lane_bytes_ + begin * kBlockBytes;
    std::uint32_t input = input_ + (first + begin) * kInputBytes;
    int left = end - begin;
    Operands operands[2];
    operands[0].load(block, input, left, zeros_);
#pragma unroll 1
    while (left > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (left > 0) {
          block += kBatch * kBlockBytes;
          input += kBatch * kInputBytes;
          left -= kBatch;
          if (left > 0) {
            operands[1 - i].load(block, input, left, zeros_);
          }
          multiply(operands[i], zero);
        }
      }
    }
    // Blocks of even numbers add up together, and those of odd ones, however long the pieces are.
    // Callers add both sums: which of them is which does not matter.
    if (kElementBytes == 2 && (end - begin) % 2 != 0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float even = sums[0][e];
        sums[0][e] = sums[1][e];
        sums[1][e] = even;
      }
    }
  }

 private:
  static constexpr int kBatch = 2;
  static constexpr int kInputBytes = kBlockCols * 2;

  struct Operands {
    uint4 weights[kBatch];
    std::uint32_t inputs[kBatch][4 / kElementBytes];

    __device__ void load(std::uint32_t block, std::uint32_t input, int left, std::uint32_t zeros) {
      weights[0] = load_shared_quad(block);
      weights[1] = load_shared_quad(left > 1 ? block + kBlockBytes : zeros);
      load_matrices(input, inputs[0]);
      load_matrices(left > 1 ? input + kInputBytes : zeros, inputs[1]);
    }
  };

  __device__ void multiply(const Operands& operands, const std::uint32_t (&zero)[2]) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      std::uint32_t a[3 - kElementBytes][4];
      fragments<kBFloat16, kElementBytes>(operands.weights[b], zero, a);
      const auto& x = operands.inputs[b];
      if constexpr (kElementBytes == 1) {
        multiply_accumulate<kBFloat16>(sums[0], a[0], x[0], x[1]);
        multiply_accumulate<kBFloat16>(sums[1], a[1], x[2], x[3]);
      } else {
        multiply_accumulate<kBFloat16>(sums[b], a[0], x[0], x[1]);
      }
    }
  }

  int lane_bytes_;
  std::uint32_t zeros_;
  std::uint32_t input_;
};

}  // namespace moq::kernels::cuda
