#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx.h"

/// Thread blocks that share a row of logits, and what they compute together. Device code only.
/// Everything here is exact and so independent of the order of threads.
namespace moq::kernels::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffU;
/// Of a block. What each thread does once, or once for each search, costs as much as several
/// tokens: few threads, each with many loads under way.
constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
static_assert(kSampleWarps <= kWarpSize, "a warp looks at all warps of a block");
constexpr int kMaxBlocks = 8;  // of a team
static_assert(kMaxBlocks <= kSampleWarps, "a warp looks at each block");

__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}
__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

/// kBlocks blocks, a cluster if there are several (compute capability 9.0).
template <int kBlocks_>
struct Team {
  static constexpr int kBlocks = kBlocks_;
  static_assert(kBlocks <= kMaxBlocks);

  __device__ static int rank() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
      return static_cast<int>(cluster_rank());
    }
#endif
    return 0;
  }
  /// A barrier of all threads of all blocks. The first one must come before any access to another
  /// block's shared memory: then all blocks have started.
  __device__ static void synchronize() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
      return synchronize_cluster();
    }
#endif
    __syncthreads();
  }
  /// Where block `rank` has what this block has at `own`, in shared memory.
  template <typename Element>
  __device__ static Element* in_block(Element* own, int rank) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
      return static_cast<Element*>(__cluster_map_shared_rank(own, static_cast<unsigned>(rank)));
    }
#endif
    return own;
  }
  /// Gives value to all blocks: slots[rank] is that of block `rank` after synchronize().
  template <typename Element>
  __device__ static void publish(Element* slots, const Element& value) {
    if (threadIdx.x < kBlocks) {
      *in_block(slots + rank(), static_cast<int>(threadIdx.x)) = value;
    }
  }
};

/// Tokens of a block, neighbours.
struct TokenRange {
  int begin;
  int end;

  /// One of `parts` equal shares.
  __device__ TokenRange share(int part, int parts) const {
    const int size = (end - begin + parts - 1) / parts;
    const int first = min(begin + part * size, end);
    return {first, min(first + size, end)};
  }
};

/// @tparam kUnroll  tokens of a thread whose loads are under way at once
template <int kUnroll = 4, typename Body>
__device__ void for_each_token(TokenRange range, const Body& body) {
#pragma unroll kUnroll
  for (int token = range.begin + static_cast<int>(threadIdx.x); token < range.end;
       token += kSampleThreads) {
    body(token);
  }
}

using Amount = unsigned long long;

__device__ inline Amount sum_lanes(Amount value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

/// The sum over this lane and those before it.
__device__ inline Amount sum_to_lane(Amount value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Amount other = __shfl_up_sync(kAllLanes, value, distance);
    value += lane_index() >= distance ? other : 0;
  }
  return value;
}

/// The sum over this lane and those behind it.
__device__ inline Amount sum_from_lane(Amount value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Amount other = __shfl_down_sync(kAllLanes, value, distance);
    value += lane_index() + distance < kWarpSize ? other : 0;
  }
  return value;
}

/// What a warp of the block, the one of this lane's number, has left in shared memory.
__device__ inline Amount of_warp(const Amount* slots) {
  return lane_index() < kSampleWarps ? slots[lane_index()] : 0;
}

// ------------------------------------------------------------------------------- the largest score

/// A number that orders floats by their own order, NaN above all. -0 must have been made +0.
__device__ inline std::uint32_t ordered_key(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  if (value != value) {
    return 0xffffffffU;
  }
  return bits ^ (0x80000000U | static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31));
}
__device__ inline float float_of_key(std::uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffU : ~key);
}

/// A row's best token: that of the largest score, the lowest of several.
struct Best {
  std::uint32_t key;
  std::uint32_t token;

  /// Whether the score is a finite number.
  __device__ bool exists() const { return key > 0x007fffffU && key < 0xff800000U; }
};

__device__ inline Best best_of_lanes(Best best) {
  const std::uint32_t key = __reduce_max_sync(kAllLanes, best.key);
  return {key, __reduce_min_sync(kAllLanes, best.key == key ? best.token : 0xffffffffU)};
}

/// Shared memory for find_best.
struct BestSlots {
  Best warps[kSampleWarps];
  Best blocks[kMaxBlocks];
};

/// The best token by score_of(token), on all threads. `peak` receives the key of the thread's own.
template <typename Team, typename Score>
__device__ Best find_best(BestSlots& slots, TokenRange range, const Score& score_of,
                          std::uint32_t& peak) {
  constexpr Best kNone{0, 0xffffffffU};
  float largest = __uint_as_float(0xff800000U);  // -infinity
  int token_of_largest = 0;
  bool has_nan = false;
  for_each_token<16>(range, [&](int token) {
    const float score = score_of(token);
    has_nan = has_nan || score != score;
    if (score > largest) {
      largest = score;
      token_of_largest = token;
    }
  });
  peak = has_nan ? 0xffffffffU : ordered_key(largest);
  const Best best = best_of_lanes({peak, static_cast<std::uint32_t>(token_of_largest)});
  if (lane_index() == 0) {
    slots.warps[warp_index()] = best;
  }
  __syncthreads();
  if (warp_index() == 0) {
    Team::publish(slots.blocks,
                  best_of_lanes(lane_index() < kSampleWarps ? slots.warps[lane_index()] : kNone));
  }
  Team::synchronize();
  return best_of_lanes(lane_index() < Team::kBlocks ? slots.blocks[lane_index()] : kNone);
}

}  // namespace moq::kernels::cuda
