#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_choice.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/linear_wgmma_maps.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"
#include "kernels/cuda/wgmma.h"

/// The tiles of wgmma_linear, and the ring in shared memory that brings their weights and tokens.
/// Device code only.
namespace moq::kernels::cuda {

constexpr int kHalfCols = 32;  // of half a step: two products
constexpr int kMaxStages = 8;
constexpr int kMaxSplit = 8;
constexpr int kMaxInterleave = 2;
constexpr int kPartTokens = 32;  // of a tile that a warpgroup writes at once
constexpr int kLeastShare = 8;   // tokens that a block of a cluster writes, at least

/// A tile of kConsumers * 64 rows, a warpgroup for each 64, by kTokens tokens.
template <int kConsumers_, int kTokens_, bool kSplits_>
struct WgmmaArrangement {
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kSplits = kSplits_;  // the columns over blocks of a cluster
};

template <bool kBFloat16_, int kElementBytes_, bool kGroups_, typename A>
struct WgmmaTileOf : A {
  static constexpr bool kBFloat16 = kBFloat16_;
  static constexpr int kElementBytes = kElementBytes_;
  static constexpr bool kGroups = kGroups_;
  static constexpr bool kSplits = A::kSplits;
  static constexpr int kInterleave = 1;  // stages from one step of a warpgroup to its next
  // Where a block has one tile, the weights of its first step come by a barrier of their own, and
  // become registers while the tokens are still on their way.
  static constexpr bool kFirstApart = kSplits && !kGroups;
  // A part of a multiprocessor has the registers of whole warpgroups, and the producer's go to the
  // others.
  static constexpr bool kMovesRegisters = A::kConsumers > 1;
  static constexpr int kThreads =
      A::kConsumers * kWarpgroup + (kMovesRegisters ? kWarpgroup : kWarpSize);
  static constexpr int kBlocks = A::kConsumers > 1 ? 1
                                 : A::kTokens > 32 ? 2
                                 : A::kTokens > 16 ? 3
                                                   : 4;  // of a multiprocessor
  static constexpr int kRows = kGroupRows * A::kConsumers;
  static constexpr int kRowBlocks = kRows / kBlockRows;

  // A stage of the ring: tokens, then weights; zero points and scales of groups lie behind all
  // stages.
  static constexpr int kTokenBytes = A::kTokens * kStepCols * 2;
  static constexpr int kStepBlocks = 2 * kElementBytes;
  static constexpr int kWeightBytes = kRowBlocks * kStepBlocks * kBlockBytes;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kGridGroups = 2;  // that a step can meet
  static constexpr int kGridBytes = kRowBlocks * kGridGroups * kBlockRows * 4;
  static constexpr int kGridsBytes = kGroups ? 2 * kGridBytes : 0;

  // Blocks that share the columns, and those of them that share the tokens of the result, at most.
  // As many of each, a power of two, or any number of the former.
  static constexpr int kMostParts = A::kTokens % 64 == 0 || A::kTokens == 16 ? kMaxSplit : 4;
  static constexpr int kMostShares = std::min(kMostParts, A::kTokens / kLeastShare);
  static constexpr bool kAnyParts = kMostShares < kMostParts;
  /// Tokens that a block of a cluster writes, or a block that has all columns.
  static constexpr int share(int split) {
    return A::kTokens / (split < kMostShares ? split : kMostShares);  // (no address of a constant)
  }

  // Results of a warpgroup on their way out: kPartTokens tokens, float32 [token, row], or rounded,
  // twice so many; where columns are split, float32 of a share from each of the blocks.
  static constexpr int kResultStride = kGroupRows + 4;  // floats: no two lanes meet in a bank
  static constexpr int kPartBytes = kPartTokens * kGroupRows * 2;
  static constexpr int kResultBytes =
      kSplits ? kMostParts * (A::kTokens / kMostShares) * kGroupRows * 4
              : (std::max(kPartTokens * kResultStride * 4, 2 * kPartBytes) + 1023) / 1024 * 1024;
  static constexpr int kBarrierBytes = (2 * kMaxStages + A::kConsumers + kMaxInterleave) * 8;
  static constexpr int kOwnResults = A::kConsumers * kResultBytes;
  static constexpr int kStages =
      std::min((kHopperSharedBytes / kBlocks - kReservedBytes - kOwnResults - kBarrierBytes) /
                   (kStageBytes + kGridsBytes),
               kMaxStages);
  static constexpr int kResultsOffset = kStages * kStageBytes;
  static constexpr int kGridsOffset = kResultsOffset + kOwnResults;
  static constexpr int kBarriersOffset = kGridsOffset + kStages * kGridsBytes;
  static constexpr int kBlockShared = kBarriersOffset + kBarrierBytes;
  static_assert(kStageBytes % 1024 == 0 && kGridBytes % 128 == 0 && kStages >= 3);
  static_assert(kInterleave <= kMaxInterleave);
};

/// The next weight, which blocks bring to the L2 cache, a share each. Plain data.
struct NextWeight {
  const void* data;
  std::int64_t bytes;
  std::int64_t share;  ///< of a block; 0: nothing is brought
};

/// Of a kernel with so many blocks.
inline NextWeight next_weight_of(const DeviceLinearArgs& args, std::int64_t blocks) {
  constexpr std::int64_t kLine = 128;
  const bool brings =
      args.next_weight != nullptr && args.m <= kPrefetchTokens && args.next_bytes <= kPrefetchBytes;
  return {args.next_weight, args.next_bytes,
          brings ? pad_to((args.next_bytes + blocks - 1) / blocks, kLine) : 0};
}

/// In which order the tiles are multiplied, and which columns of them. Plain data.
struct WgmmaWalk {
  int steps;  ///< of kStepCols columns, all of them
  int first_row_block;
  int row_tiles;
  int token_tiles;
  int clusters;     ///< that take the tiles in turn
  int split;        ///< blocks of a cluster, which share the columns
  int token_bytes;  ///< of a step
  bool stores;      ///< results go to the output as they are: can_store
  NextWeight next;
};

/// Where a block's tile is.
struct WgmmaPlace {
  int row_block;
  int token;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// By one thread of each block.
__device__ inline void bring(const NextWeight& next) {
  const std::int64_t first = blockIdx.x * next.share;
  if (next.share > 0 && first < next.bytes) {
    prefetch_bytes(static_cast<const char*>(next.data) + first,
                   static_cast<std::uint32_t>(min(next.share, next.bytes - first)));
  }
}

/// The tile of the cluster that takes `index`. Those that are multiplied at once lie
/// close together, so that the cache holds what they share.
template <typename T>
__device__ WgmmaPlace place_of(const WgmmaWalk& walk, int index) {
  constexpr int kBand = 8;  // tiles of rows
  const int band = index / (kBand * walk.token_tiles);
  const int inside = index - band * kBand * walk.token_tiles;
  const int rows = min(kBand, walk.row_tiles - band * kBand);
  const int row_tile = band * kBand + inside % rows;
  return {walk.first_row_block + row_tile * T::kRowBlocks, inside / rows * T::kTokens};
}

/// A place in the ring of a block.
template <typename T>
struct WgmmaSlot {
  std::uint32_t stage = 0;
  std::uint32_t parity = 0;  ///< of the round

  __device__ void advance() {
    stage += T::kInterleave;
    if (stage >= T::kStages) {
      stage -= T::kStages;
      parity ^= 1;
    }
  }
};

/// Addresses in shared memory of a ring.
template <typename T>
struct WgmmaRing {
  std::uint32_t base;

  __device__ std::uint32_t tokens(std::uint32_t stage) const {
    return base + stage * T::kStageBytes;
  }
  __device__ std::uint32_t weights(std::uint32_t stage) const {
    return tokens(stage) + T::kTokenBytes;
  }
  __device__ std::uint32_t zero_points(std::uint32_t stage) const {
    return base + T::kGridsOffset + stage * T::kGridsBytes;
  }
  __device__ std::uint32_t scales(std::uint32_t stage) const {
    return zero_points(stage) + T::kGridBytes;
  }
  /// Ends a round when what was asked for has come.
  __device__ std::uint32_t full(std::uint32_t stage) const {
    return base + T::kBarriersOffset + stage * 8;
  }
  /// Ends a round when all warps that read the stage have done so.
  __device__ std::uint32_t empty(std::uint32_t stage) const { return full(stage) + kMaxStages * 8; }
  /// Ends when a warpgroup has got what other blocks send.
  __device__ std::uint32_t received(int consumer) const {
    return full(0) + (2 * kMaxStages + consumer) * 8;
  }
  /// Ends when the weights of a warpgroup's first step have come: T::kFirstApart.
  __device__ std::uint32_t first_weights(std::uint32_t stage) const {
    return received(T::kConsumers) + stage * 8;
  }
  /// Makes the barriers. By one thread, as expect_shares().
  __device__ void init() const {
    for (int i = 0; i < T::kStages; ++i) {
      init_barrier(full(i), 1);
      init_barrier(empty(i), T::kConsumers * 4);
    }
    for (int i = 0; i < T::kConsumers; ++i) {
      init_barrier(received(i), 1);
    }
    for (int i = 0; i < T::kInterleave; ++i) {
      init_barrier(first_weights(i), 1);
    }
    publish_barriers();
  }
  /// Lets received() await what the other ones of `split` blocks with the same rows send to one
  /// that has a share of the tokens.
  __device__ void expect_shares(int split) const {
    for (int i = 0; i < T::kConsumers; ++i) {
      expect_bytes(received(i), kGroupRows * T::share(split) * 4 * (split - 1));
    }
  }
  __device__ void wait(const WgmmaSlot<T>& slot) const {
    wait_barrier(full(slot.stage), slot.parity);
  }
  /// By a warp that has read it.
  __device__ void free(const WgmmaSlot<T>& slot) const {
    if (threadIdx.x % kWarpSize == 0) {
      arrive(empty(slot.stage));
    }
  }
};

/// Fetches the steps of a tile, one after the other.
template <typename T>
struct WgmmaProducer {
  const WgmmaRing<T> ring;
  const WgmmaMaps& maps;
  const DeviceLayout& layout;
  const int token_bytes;  ///< of a step

  /// first: the first time that this is called for the stage.
  __device__ void fetch_weights(const WgmmaPlace& tile, int step, std::uint32_t stage,
                                bool first) const {
    const bool zero_points = T::kGroups && layout.asymmetric;
    const bool apart = T::kFirstApart && first && stage < T::kInterleave;
    const std::uint32_t barrier = apart ? ring.first_weights(stage) : ring.full(stage);
    if (apart) {
      expect_bytes(ring.full(stage), token_bytes);
    }
    expect_bytes(barrier, T::kWeightBytes + (apart ? 0 : token_bytes) +
                              (T::kGroups ? T::kGridBytes : 0) + (zero_points ? T::kGridBytes : 0));
    copy_box(ring.weights(stage), maps.weight, step * 256, tile.row_block, barrier);
    if constexpr (T::kGroups) {
      const int group = static_cast<int>(step * kStepCols / layout.group_size) * kBlockRows;
      copy_box(ring.scales(stage), maps.scales, group, tile.row_block, barrier);
      if (zero_points) {
        copy_box(ring.zero_points(stage), maps.zero_points, group, tile.row_block, barrier);
      }
    }
  }
  __device__ void fetch_tokens(const WgmmaPlace& tile, int step, std::uint32_t stage) const {
    copy_box(ring.tokens(stage), maps.tokens, step * kStepCols, tile.token, ring.full(stage));
  }
};

#endif

}  // namespace moq::kernels::cuda
