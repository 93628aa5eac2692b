#pragma once

#include <cstdint>

#include "kernels/cuda/sampling_team.h"

/// Scores and weights of the tokens of a row. Device code only.
namespace moq::kernels::cuda {

/// A row's logits after the repetition penalty.
struct Scores {
  const float* logits;
  const std::uint32_t* seen;  ///< null: no penalty
  float penalty;

  __device__ float operator()(int token) const {
    float score = logits[token];
    if (seen != nullptr && (seen[token / 32] >> (token % 32) & 1U) != 0) {
      score = score < 0.0F ? score * penalty : score / penalty;
    }
    return score + 0.0F;  // -0 ties with +0
  }
};

/// e^x for x <= 0 by the operations of the CPU's vector code (kernels/cpu/simd/float_math.h), so
/// that its bits are those: what is kept must not depend on the device. Below e^-40, which
/// fixed_point makes zero, it is e^-40.
__device__ inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504F;
  constexpr float kHigh = 0.693145751953125F;
  constexpr float kLow = 1.42860677e-06F;
  constexpr float kRound = 0x1.8p23F;  // what is added to it is rounded to an integer
  x = fmaxf(x, -40.0F);
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = fmaf(n, -kLow, fmaf(n, -kHigh, x));
  float q = 1.392625039e-03F;
  q = fmaf(q, r, 8.363232948e-03F);
  q = fmaf(q, r, 4.166655242e-02F);
  q = fmaf(q, r, 1.666657627e-01F);
  q = fmaf(q, r, 5.000000000e-01F);
  const float power = 1.0F + fmaf(q, r * r, r);
  // Times 2^n: the last bits of `rounded` are those of n.
  return __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
}

/// A token's weight, its probability relative to the most probable one's, in units of 2^-44:
/// high * 2^22 + low. Amounts of 2^19 tokens do not overflow. Weights from 2^-20 on are exact, as
/// floats have 24 bits.
struct Fixed {
  std::uint32_t high;
  std::int32_t low;
};

__device__ inline Amount amount_of(Fixed fixed) {
  return (static_cast<Amount>(fixed.high) << 22) + static_cast<Amount>(std::int64_t{fixed.low});
}
__device__ inline Amount amount_of(std::uint32_t count) {
  return count;
}

/// Floats in [2, 4) have steps of 2^-22: what is added to 3 is rounded to that.
__device__ inline Fixed fixed_point(float weight) {
  constexpr float kRound = 3.0F;
  constexpr std::uint32_t kRoundBits = 0x40400000U;
  const float high = weight + kRound;
  const float rest = weight - (high - kRound);
  const float low = fmaf(rest, 0x1p22F, kRound);
  return {__float_as_uint(high) - kRoundBits,
          static_cast<std::int32_t>(__float_as_uint(low) - kRoundBits)};
}

/// The weights of tokens, zero for those that top-k removes: kept in shared memory, which first
/// holds the scores, or computed whenever they are asked for.
template <bool kCached>
struct Weights {
  Scores scores;
  TokenRange range;
  float* cache;
  float largest = 0.0F;
  float temperature = 1.0F;
  std::uint32_t least_key = 0;  ///< of a score that is kept

  __device__ float score(int token) const {
    return kCached ? cache[token - range.begin] : scores(token);
  }
  __device__ float weight_of(float score) const {
    return ordered_key(score) < least_key ? 0.0F : exponential((score - largest) / temperature);
  }
  /// After fix().
  __device__ float weight(int token) const {
    return kCached ? cache[token - range.begin] : weight_of(scores(token));
  }
  /// From here on, what is cached are weights.
  __device__ void fix() const {
    if constexpr (kCached) {
      for_each_token(range, [&](int token) {
        float& cached = cache[token - range.begin];
        cached = weight_of(cached);
      });
      __syncthreads();  // other threads ask for them
    }
  }
};

}  // namespace moq::kernels::cuda
