#pragma once

#include "kernels/cuda/decode_step_exchange.h"
#include "kernels/cuda/ptx.h"

/// What a projection of the decode step multiplies, as it comes out of the exchange: a warp's
/// numbers of it, in the order of the exchanged words. Device code only.
namespace moq::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// A score that no key reaches; exp2 of differences to it is 0.
constexpr float kLeastScore = -1e30F;

template <int kRounds, typename Element>
class Inputs {
  using Slots = Slot<kRounds>;

 public:
  static constexpr int kWords = (kRounds + 3) / 4;  // of a lane, in a row of hidden_size
  template <int kCount>
  using Numbers = float[kCount][4];
  using Norm = float4[kWords][2];  ///< weights and biases

  /// @param moments  [2][8]: shared memory, 0 where there is no warp
  __device__ Inputs(const Parameters& parameters, float2 (*moments)[8])
      : p_(parameters),
        moments_(moments),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        copy_(p_.exchange + blockIdx.x % kCopies * Slots::kCopyBytes),
        own_(copy_ + (warp_ * kBlockWords + lane_) * 8 +
             lane_ / kBlockWords * (kWarps - 1) * kBlockWords * 8) {}

  /// A row of so many column blocks; `part`: where it begins in the exchange.
  template <int kCount>
  __device__ __forceinline__ void ask_row(Numbers<kCount>& numbers, std::uint32_t part,
                                          int col_blocks) {
    uint2 words[kCount];
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
      words[q] = unknown(col_block(q) < col_blocks);
    }
    ask_all<kNoNumbers>(words, own_ + part, kWordStep);
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
      numbers_of_word<Element>(words[q], numbers[q]);
    }
  }

  /// The step's input, whose columns lie in their own order.
  __device__ __forceinline__ void load_input(Numbers<kWords>& numbers) const {
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      uint2 word{0, 0};
      if (const int block = col_block(q); block < p_.col_blocks) {
        const int of_block = lane_ % kBlockWords;
        const std::uint16_t* const from =
            p_.input + block * kBlockCols + of_block / 4 * kBlockRows + column_at(of_block % 4 * 4);
        word.x = *reinterpret_cast<const std::uint32_t*>(from);
        word.y = *reinterpret_cast<const std::uint32_t*>(from + 8);
      }
      numbers_of_word<Element>(word, numbers[q]);
    }
  }

  /// What the attention gave: the parts of a head's keys, by their shares of its softmax.
  __device__ __forceinline__ void ask_attended(Numbers<kWords>& numbers, std::uint32_t slot) {
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      const int block = col_block(q);
      const bool exists = block < p_.col_blocks;
      uint2 words[kSplits];
      uint2 shares[kSplits];
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        words[s] = shares[s] = unknown(exists);
      }
      ask_all<kNoFloats>(
          shares, copy_ + slot + Slots::kShares + block / (kHeadDim / kBlockCols) * (kSplits * 8),
          8);
      ask_all<kNoNumbers>(words, own_ + slot + Slots::kAttended + q * kWordStep, Slots::kRow);
      float greatest = kLeastScore;
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        greatest = fmaxf(greatest, __uint_as_float(shares[s].x));
      }
      float total = 0.0F;
      float sums[4] = {};
#pragma unroll
      for (int s = 0; s < kSplits; ++s) {
        const float weight =
            fast_exp2(__uint_as_float(shares[s].x) - greatest) * __uint_as_float(shares[s].y);
        total += weight;
        float part[4];
        numbers_of_word<Element>(words[s], part);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[j] = fmaf(weight, part[j], sums[j]);
        }
      }
      const float factor = exists ? __fdividef(1.0F, total) : 0.0F;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        numbers[q][j] = sums[j] * factor;
      }
    }
  }

  /// Two neighbouring words, and if `second` is not null two there.
  __device__ __forceinline__ void ask_pairs(uint4& first, const char* from, uint4& second,
                                            const char* from_second) {
    do {
      first = ask_pair(from);
      second = from_second == nullptr ? make_uint4(0, 0, 0, 0) : ask_pair(from_second);
    } while (patience_.again(absent(first) || absent(second)));
  }

  __device__ __forceinline__ void load_norm(Norm& norm, int index) const {
    const float4* const from =
        p_.norms + static_cast<std::int64_t>(index) * (p_.hidden / 2) + lane_ % kBlockWords * 2;
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      norm[q][0] = norm[q][1] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (const int block = col_block(q); block < p_.col_blocks) {
        norm[q][0] = from[block * kBlockWords * 2];
        norm[q][1] = from[block * kBlockWords * 2 + 1];
      }
    }
  }

  /// LayerNorm. Its moments are those of differences from the mean of the input before, so that one
  /// pass does, unless that lies so far off that it would drown the variance: then a second pass
  /// takes differences from the mean that the first one found.
  __device__ __forceinline__ void normalise(Numbers<kWords>& numbers, const Norm& norm) {
    constexpr float kFar = 256.0F;  // squared, in variances: costs so many units of rounding
    float2 moments = moments_of(numbers);
    float shift = moments.x * p_.inverse_hidden;
    float variance = fmaf(-shift, shift, moments.y * p_.inverse_hidden);
    if (shift * shift > kFar * variance) {  // for all threads alike
      pivot_ += shift;
      moments = moments_of(numbers);
      shift = moments.x * p_.inverse_hidden;
      variance = fmaf(-shift, shift, moments.y * p_.inverse_hidden);
    }
    pivot_ += shift;
    const float mean = pivot_;
    // (Rounding may have made it negative.)
    const float factor = rsqrtf(positive_part(variance) + p_.epsilon);
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      const float4& weight = norm[q][0];  // 0 where there are no columns
      const float4& bias = norm[q][1];
      const float weights[4] = {weight.x, weight.y, weight.z, weight.w};
      const float biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        numbers[q][j] = fmaf((numbers[q][j] - mean) * factor, weights[j], biases[j]);
      }
    }
  }

 private:
  /// Sums of a row's differences from the pivot, and of their squares.
  __device__ __forceinline__ float2 moments_of(const Numbers<kWords>& numbers) {
    float sum = 0.0F;
    float squares = 0.0F;
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      if (col_block(q) < p_.col_blocks) {
        float d[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          d[j] = numbers[q][j] - pivot_;
        }
        sum += (d[0] + d[1]) + (d[2] + d[3]);
        squares += fmaf(d[0], d[0], d[1] * d[1]) + fmaf(d[2], d[2], d[3] * d[3]);
      }
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, distance);
      squares += __shfl_xor_sync(kWholeWarp, squares, distance);
    }
    if (lane_ == 0) {
      moments_[turn_][warp_] = make_float2(sum, squares);
    }
    meet_consumers();
    float2 moments = moments_[turn_][lane_ % 8];
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
      moments.x += __shfl_xor_sync(kWholeWarp, moments.x, distance);
      moments.y += __shfl_xor_sync(kWholeWarp, moments.y, distance);
    }
    turn_ ^= 1;
    return moments;
  }

  /// From a lane's word to its next one.
  static constexpr int kWordStep = kWarps * kWarpSize * 8;

  /// The column block that word q of this lane belongs to.
  __device__ __forceinline__ int col_block(int q) const {
    return warp_ + kWarps * (q * (kWarpSize / kBlockWords) + lane_ / kBlockWords);
  }

  /// A word to ask for, or one of zeros.
  __device__ static __forceinline__ uint2 unknown(bool exists) {
    return exists ? make_uint2(kClear, kClear) : make_uint2(0, 0);
  }

  /// Asks for all words, `step` bytes apart, until they are there.
  template <std::uint32_t kAbsentFrom, int kCount>
  __device__ __forceinline__ void ask_all(uint2 (&words)[kCount], const char* from, int step) {
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        ask<kAbsentFrom>(words[q], from + q * step);
      }
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        missing |= words[q].y >= kAbsentFrom;
      }
    } while (patience_.again(missing));
  }

  const Parameters& p_;
  float2 (*moments_)[8];
  int warp_;
  int lane_;
  const char* copy_;  // the one of the exchange that this thread block reads
  const char* own_;   // this lane's first word of a row in it
  Patience patience_;
  int turn_ = 0;
  float pivot_ = 0.0F;
};

#endif

}  // namespace moq::kernels::cuda::step
