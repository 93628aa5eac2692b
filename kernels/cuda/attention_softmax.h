#pragma once

#include <cstdint>

#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/ptx.h"

/// What the tensor-core kernels of attention make of the scores of a tile of keys: masks, ALiBi and
/// the streaming softmax. Device code only.
///
/// A warp multiplies tiles of 16 rows. In an accumulator of mma.m16n8k16 lane 4g + t holds columns
/// 2t, 2t + 1 of rows g and g + 8.
namespace moq::kernels::cuda {

constexpr int kRowsOfTile = 16;
constexpr float kMinusInfinity = -__builtin_huge_valf();

/// The two rows (g and g + 8) of each tile of rows that a lane works on.
template <int kRowTiles>
struct Softmax {
  float largest[kRowTiles][2];  ///< score that probabilities are relative to
  float sum[kRowTiles][2];      ///< of probabilities, of this lane's keys

  __device__ Softmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[r][half] = kMinusInfinity;
        sum[r][half] = 0.0F;
      }
    }
  }
};

/// Probabilities are 2^(score * scale - reference).
__device__ inline float reference_of(float largest, float scale) {
  return largest == kMinusInfinity ? 0.0F : largest * scale;
}

/// The base-2 logarithms of step sizes of values, in units of scores.
template <bool kInt8, int kKeyTiles>
__device__ void offsets_of(const float (&value_scales)[kKeyTiles][2], float inverse_scale,
                           float (&offset)[kKeyTiles][2]) {
  constexpr float kMinScale = 0x1p-64F;
  if constexpr (kInt8) {
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        offset[k][e] = __log2f(fmaxf(value_scales[k][e], kMinScale)) * inverse_scale;
      }
    }
  }
}

/// Raises what probabilities are relative to where they would reach 2^kSlack otherwise: after the
/// first keys that seldom happens. Returns whether that is so in a row of this warp; then
/// `shrink` are the factors of the output so far.
///
/// @param scale  of scores, > 0, times log2(e)
/// @param value_scales  of codes: step sizes of the values of this lane's keys; they multiply the
///                      probabilities, not their sum, and the reference is chosen so that the
///                      largest product is about 1
template <bool kInt8, int kRowTiles, int kKeyTiles>
__device__ bool raise_references(const float (&scores)[kRowTiles][kKeyTiles][4],
                                 Softmax<kRowTiles>& softmax, float scale,
                                 const float (&value_scales)[kKeyTiles][2],
                                 float (&shrink)[kRowTiles][2]) {
  constexpr float kSlack = 8.0F;
  const float inverse_scale = __fdividef(1.0F, scale);
  float offset[kKeyTiles][2] = {};
  offsets_of<kInt8>(value_scales, inverse_scale, offset);
  float largest[kRowTiles][2];
  bool moves = false;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = kMinusInfinity;
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score = scores[r][k][2 * half + e];
          top = fmaxf(top, kInt8 ? score + offset[k][e] : score);
        }
      }
      largest[r][half] = top;
      moves = moves || top > softmax.largest[r][half] + kSlack * inverse_scale;
    }
  }
  if (!__any_sync(0xffffffffU, moves)) {
    return false;
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = largest[r][half];
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
      top = fmaxf(top, softmax.largest[r][half]);
      const float before = softmax.largest[r][half];
      shrink[r][half] = before == kMinusInfinity
                            ? 0.0F
                            : fast_exp2(reference_of(before, scale) - reference_of(top, scale));
      softmax.largest[r][half] = top;
      softmax.sum[r][half] *= shrink[r][half];
    }
  }
  return true;
}

template <int kRowTiles, int kTiles>
__device__ void shrink_output(float (&output)[kRowTiles][kTiles][4],
                              const float (&shrink)[kRowTiles][2]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        output[r][n][i] *= shrink[r][i / 2];
      }
    }
  }
}

/// Turns scores into probabilities, in place, and adds them to the sums.
template <bool kInt8, int kRowTiles, int kKeyTiles>
__device__ void exponentiate(float (&scores)[kRowTiles][kKeyTiles][4], Softmax<kRowTiles>& softmax,
                             float scale, const float (&value_scales)[kKeyTiles][2]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference = reference_of(softmax.largest[r][half], scale);
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[r][k][2 * half + e];
          score = fast_exp2(fmaf(score, scale, -reference));
          softmax.sum[r][half] += score;
          if constexpr (kInt8) {
            score *= value_scales[k][e];
          }
        }
      }
    }
  }
}

/// The sum of the four lanes that share a row.
__device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(0xffffffffU, value, 1);
  return value + __shfl_xor_sync(0xffffffffU, value, 2);
}

/// What a row is and sees.
struct alignas(16) Sight {
  int limit;     ///< keys from it on are hidden
  int position;  ///< of the token among the keys
  int head;      ///< of the group
  float slope;   ///< ALiBi's, over the scale of scores
};

__device__ inline Sight sight_of(const DeviceAttentionArgs& args, int kv_head, int group,
                                 const RowMap::Place& row, int past, int keys) {
  const int position = past + row.token;
  return {args.causal ? min(position + 1, keys) : keys, position, row.head,
          args.alibi_slopes == nullptr
              ? 0.0F
              : args.alibi_slopes[kv_head * group + row.head] / args.scale};
}

/// Score s[r][k] of a lane belongs to keys first + 8k + 2t and the next. `sight`: sight(r, half) of
/// its rows.
template <int kRowTiles, int kKeyTiles, typename GetSight>
__device__ void add_alibi(float (&scores)[kRowTiles][kKeyTiles][4], const GetSight& sight,
                          int first, int t) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Sight row = sight(r, half);
      const auto position = static_cast<float>(row.position);
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto key = static_cast<float>(first + 8 * k + 2 * t + e);
          float& score = scores[r][k][2 * half + e];
          score = fmaf(-row.slope, fabsf(position - key), score);
        }
      }
    }
  }
}

template <int kRowTiles, int kKeyTiles, typename GetSight>
__device__ void hide_keys(float (&scores)[kRowTiles][kKeyTiles][4], const GetSight& sight,
                          int first, int t) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int limit = sight(r, half).limit - first - 2 * t;
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * k + e >= limit) {
            scores[r][k][2 * half + e] = kMinusInfinity;
          }
        }
      }
    }
  }
}

}  // namespace moq::kernels::cuda
