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

  /// `first` is the address of the warp's first column of the first token; tokens are `stride`
  /// elements apart.
  __device__ Products(std::uint32_t first, int stride, int m, int lane)
      : lane_bytes_(lane * kLaneBytes) {
    // The matrices that the lane gives are 32 columns. A column of B that is no token may hold
    // anything: its results are not read.
    const int token = lane % 8 < m ? lane % 8 : 0;
    input_ = first + (token * stride + lane / 8 * 8) * 2;
    compute_now(lane_bytes_);
    compute_now(input_);
  }

  __device__ void clear() {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[0][e] = sums[1][e] = 0.0F;
    }
  }

  /// Adds the products of blocks [begin, end) of a piece at `held`, whose first is the first-th of
  /// the warp's. They are taken two by two, the operands of the next two under way, behind a single
  /// one if their number is odd.
  __device__ void add(std::uint32_t held, int begin, int end, int first,
                      const std::uint32_t (&zero)[2]) {
    std::uint32_t block = held + lane_bytes_ + begin * kBlockBytes;
    std::uint32_t input = input_ + (first + begin) * kInputBytes;
    int left = (end - begin) / 2;
    Operands<2> pairs[2];
    if ((end - begin) % 2 != 0) {
      Operands<1> single;
      single.load(block, input);
      block += kBlockBytes;
      input += kInputBytes;
      if (left > 0) {
        pairs[0].load(block, input);
      }
      multiply(single, zero);
      exchange_sums();
    } else if (left > 0) {
      pairs[0].load(block, input);
    }
#pragma unroll 1
    while (left > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (left > 0) {
          block += 2 * kBlockBytes;
          input += 2 * kInputBytes;
          if (--left > 0) {
            pairs[1 - i].load(block, input);
          }
          multiply(pairs[i], zero);
        }
      }
    }
  }

 private:
  static constexpr int kInputBytes = kBlockCols * 2;

  /// Of so many blocks: a lane's weights, and the input as matrices of 8 columns, two of which are
  /// a B fragment.
  template <int kBlocks>
  struct Operands {
    static constexpr int kMatrices = kBlocks * kBlockCols / 8;
    uint4 weights[kBlocks];
    std::uint32_t inputs[kMatrices];

    __device__ void load(std::uint32_t block, std::uint32_t input) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        weights[b] = load_shared_quad(block + b * kBlockBytes);
      }
      constexpr int kAtOnce = kMatrices < 4 ? kMatrices : 4;
#pragma unroll
      for (int i = 0; i < kMatrices; i += kAtOnce) {
        std::uint32_t words[kAtOnce];
        load_matrices(input + i * 8 * 2, words);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          inputs[i + j] = words[j];
        }
      }
    }
  };

  template <int kBlocks>
  __device__ void multiply(const Operands<kBlocks>& operands, const std::uint32_t (&zero)[2]) {
    constexpr int kProducts = kBlockCols / 16;  // of a block
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      std::uint32_t a[kProducts][4];
      fragments<kBFloat16, kElementBytes>(operands.weights[b], zero, a);
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const int product = b * kProducts + i;
        multiply_accumulate<kBFloat16>(sums[product % 2], a[i], operands.inputs[2 * product],
                                       operands.inputs[2 * product + 1]);
      }
    }
  }

  /// Behind a single block. Those of even numbers add up together, and those of odd ones, however
  /// long the pieces are. Callers add both sums: which of them is which does not matter.
  __device__ void exchange_sums() {
    if constexpr (kElementBytes == 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float other = sums[1][e];
        sums[1][e] = sums[0][e];
        sums[0][e] = other;
      }
    }
  }

  int lane_bytes_;
  std::uint32_t input_;
};

}  // namespace moq::kernels::cuda
