#pragma once

#include <cstdint>
#include <numbers>

#include "kernels/cuda/attention_products.h"
#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/qkv_attention_tile.h"

/// The attention of qkv_attention, as flash_attention's but for where things lie. Device code only.
namespace moq::kernels::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A warp's rows, and what their keys have brought so far.
struct Attended {
  Softmax<1> softmax;
  float output[1][kHeadDim / 8][4] = {};
};

/// The second warpgroup's part, whose keys are others.
template <typename T>
__device__ __forceinline__ void hand_over(std::uint8_t* shared, const Attended& own) {
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    *handed<T>(shared, n) =
        float4{own.output[0][n][0], own.output[0][n][1], own.output[0][n][2], own.output[0][n][3]};
  }
  *handed<T>(shared, kHeadDim / 8) = float4{own.softmax.largest[0][0], own.softmax.largest[0][1],
                                            own.softmax.sum[0][0], own.softmax.sum[0][1]};
}

template <typename T>
__device__ __forceinline__ void take_over(std::uint8_t* shared, float scale, Attended& own) {
  const float4 state = *handed<T>(shared, kHeadDim / 8);
  const float largest[2] = {state.x, state.y};
  const float sum[2] = {state.z, state.w};
  float keep[2];
  float add[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& reference = own.softmax.largest[0][half];
    const float top = fmaxf(reference, largest[half]);
    const auto factor = [&](float before) {
      return before == kMinusInfinity
                 ? 0.0F
                 : fast_exp2(reference_of(before, scale) - reference_of(top, scale));
    };
    keep[half] = factor(reference);
    add[half] = factor(largest[half]);
    own.softmax.sum[0][half] = own.softmax.sum[0][half] * keep[half] + sum[half] * add[half];
    reference = top;
  }
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    const float4 other = *handed<T>(shared, n);
    own.output[0][n][0] = own.output[0][n][0] * keep[0] + other.x * add[0];
    own.output[0][n][1] = own.output[0][n][1] * keep[0] + other.y * add[0];
    own.output[0][n][2] = own.output[0][n][2] * keep[1] + other.z * add[1];
    own.output[0][n][3] = own.output[0][n][3] * keep[1] + other.w * add[1];
  }
}

/// Attention of the 64 queries in `shared` to the keys and values behind `keys`: a tile of them for
/// each warpgroup, or all for one.
template <typename T>
__device__ __forceinline__ void attend_to_keys(const HeadArgs& args, const DeviceSequence& sequence,
                                               int group, int head, int first_token,
                                               std::uint8_t* shared, std::uint32_t keys) {
  using Element = typename ElementOf<T::kBFloat16>::Type;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_keys = sequence.num_tokens;
  const int warp_token = first_token + warp * kRowsOfTile;  // of the sequence
  std::uint8_t* const rows = shared + warp * kRowsOfTile * kTokenRowBytes;
  const float slope = args.alibi_slopes == nullptr ? 0.0F : args.alibi_slopes[head] / args.scale;
  const auto limit_of = [&](int token) {
    return args.causal ? min(token + 1, num_keys) : num_keys;
  };
  const auto sight = [&](int /*r*/, int half) {
    const int token = warp_token + lane / 4 + 8 * half;
    return Sight{limit_of(token), token, 0, slope};
  };
  // Rows behind the sequence are of the next one. They must not matter to a decision that a warp
  // makes for all its rows.
  const int existing = min(kRowsOfTile, num_keys - warp_token);
  const auto query = [&](int step, std::uint32_t(&a)[1][4]) {
    query_fragments<false, kHeadDim>(shared_address(rows), existing, step, lane, a[0]);
  };
  const int least_limit = limit_of(warp_token);
  const int warp_end = warp_token < num_keys ? limit_of(warp_token + kRowsOfTile - 1) : 0;
  const float scale = args.scale * std::numbers::log2e_v<float>;
  Attended own;
  const int begin = group * kHeadTokens;
  for (int first = begin; first < warp_end; first += T::kWarpgroups * kHeadTokens) {
    attend<T::kBFloat16, false, kHeadDim, kHeadTokens, 1>(
        keys + first / kHeadTokens * 2 * kTileBytes, query, sight, first, first == begin,
        first + kHeadTokens > least_limit, args.alibi_slopes != nullptr, scale, lane, own.softmax,
        own.output);
  }
  if constexpr (T::kWarpgroups == 2) {
    if (num_keys > kHeadTokens) {
      if (group == 1) {
        hand_over<T>(shared, own);
      }
      meet<T::kConsumerThreads>(kAllBarrier);
      if (group == 0) {
        take_over<T>(shared, scale, own);
      }
    }
    if (group == 1) {
      return;
    }
  }
  __syncwarp();
  finish_rows<T::kBFloat16, false, kHeadDim>(rows, lane, own.softmax, own.output);
  __syncwarp();
  each_piece<kRowsOfTile, kHeadDim / 8, kWarpSize>(lane, [&](int row, int chunk) {
    const int token = warp_token + row;
    if (token < num_keys) {
      Element* const place =
          static_cast<Element*>(args.output) +
          (sequence.token_begin + static_cast<std::int64_t>(token)) * args.output_stride +
          head * kHeadDim + chunk * 8;
      *reinterpret_cast<uint4*>(place) =
          *reinterpret_cast<const uint4*>(rows + row * kTokenRowBytes + chunk * 16);
    }
  });
}

#endif

}  // namespace moq::kernels::cuda
