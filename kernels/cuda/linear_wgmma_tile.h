#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/linear_wgmma_maps.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"
#include "kernels/cuda/wgmma.h"

/// How wgmma_linear multiplies a tile: the ring that brings weights and tokens, and the loop over
/// the columns. Device code only.
///
/// The weight's rows are the rows of a product, from registers, and tokens its columns, from shared
/// memory as a tensor map lays them out. A lane's 16 bytes of a packed block become the registers
/// of two products (one-byte elements) or one while the products before them run.
namespace moq::kernels::cuda {

constexpr int kWarpgroup = 128;  // threads
constexpr int kGroupRows = 64;   // of the weight in one product of a warpgroup
constexpr int kHalfCols = 32;    // of half a step: two products
constexpr int kMaxStages = 8;
constexpr int kMaxSplit = 8;
constexpr int kPartTokens = 32;                  // of a tile that a warpgroup writes at once
constexpr int kSharedBytes = 227 << 10;          // of a block that has a multiprocessor for itself
constexpr int kSharedOfTwo = (228 << 9) - 1024;  // of one of two blocks

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
  // A part of a multiprocessor has the registers of whole warpgroups, and the producer's go to the
  // others.
  static constexpr bool kMovesRegisters = A::kConsumers > 1;
  static constexpr int kThreads =
      A::kConsumers * kWarpgroup + (kMovesRegisters ? kWarpgroup : kWarpSize);
  static constexpr int kBlocks = A::kConsumers > 1 ? 1 : 2;  // of a multiprocessor
  static constexpr int kRows = kGroupRows * A::kConsumers;
  static constexpr int kRowBlocks = kRows / kBlockRows;

  // A stage of the ring: tokens, then weights; zero points and scales lie behind all stages.
  static constexpr int kTokenBytes = A::kTokens * kStepCols * 2;
  static constexpr int kStepBlocks = 2 * kElementBytes;
  static constexpr int kWeightBytes = kRowBlocks * kStepBlocks * kBlockBytes;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kGridGroups = kGroups ? 2 : 1;  // that a step can meet
  static constexpr int kGridBytes = kRowBlocks * kGridGroups * kBlockRows * 4;
  static constexpr int kGridsBytes = kElementBytes == 2 ? 0 : kGroups ? 2 * kGridBytes : kGridBytes;

  // Results on their way out: float32 [token, row], all of a tile where columns are split, over the
  // ring, else kPartTokens tokens of a warpgroup; or rounded, twice so many.
  static constexpr int kResultTokens = kSplits ? A::kTokens : kPartTokens;
  static constexpr int kResultStride = kGroupRows + 4;  // floats: no two lanes meet in a bank
  static constexpr int kPartBytes = kPartTokens * kGroupRows * 2;
  static constexpr int kResultBytes =
      (std::max(kResultTokens * kResultStride * 4, 2 * kPartBytes) + 1023) / 1024 * 1024;
  static constexpr int kBarrierBytes = 2 * kMaxStages * 8;
  static constexpr int kOwnResults = kSplits ? 0 : A::kConsumers * kResultBytes;
  static constexpr int kStages =
      std::min(((kBlocks == 1 ? kSharedBytes : kSharedOfTwo) - kOwnResults - kBarrierBytes) /
                   (kStageBytes + kGridsBytes),
               kMaxStages);
  static constexpr int kResultsOffset = kSplits ? 0 : kStages * kStageBytes;
  static constexpr int kGridsOffset = kStages * kStageBytes + kOwnResults;
  static constexpr int kBarriersOffset = kGridsOffset + kStages * kGridsBytes;
  static constexpr int kBlockShared = kBarriersOffset + kBarrierBytes;
  static_assert(kStageBytes % 1024 == 0 && kGridBytes % 128 == 0 && kStages >= 3);
  static_assert(!kSplits || kResultBytes <= kStages * kStageBytes);
};

/// In which order the tiles are multiplied, and which columns of them. Plain data.
struct WgmmaWalk {
  int steps;      ///< of kStepCols columns, all of them
  int row_tiles;  ///< of a cluster's rows
  int token_tiles;
  int clusters;  ///< that take the tiles in turn
  /// Blocks of a cluster that have the same tokens, of which each fetches a part for all of them,
  /// and blocks that share the columns: block r has rows r % sharing and columns r / sharing.
  int sharing;
  int split;
  bool stores;  ///< results go to the output as they are: can_store
};

/// Where a block's tile is.
struct WgmmaPlace {
  int row_block;
  int token;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// The tile of a block of the cluster that takes `index`. Those that are multiplied at once lie
/// close together, so that the cache holds what they share.
template <typename T>
__device__ WgmmaPlace place_of(const WgmmaWalk& walk, int index, int row_rank) {
  constexpr int kBand = 8;  // tiles of rows
  const int band = index / (kBand * walk.token_tiles);
  const int inside = index - band * kBand * walk.token_tiles;
  const int rows = min(kBand, walk.row_tiles - band * kBand);
  const int row_tile = (band * kBand + inside % rows) * walk.sharing + row_rank;
  return {row_tile * T::kRowBlocks, inside / rows * T::kTokens};
}

/// Addresses in shared memory of a place in the ring. Places count on and on; stages repeat.
template <typename T>
struct WgmmaRing {
  std::uint32_t base;

  __device__ static std::uint32_t stage(std::uint32_t place) { return place % T::kStages; }
  __device__ static std::uint32_t round(std::uint32_t place) { return place / T::kStages & 1; }
  __device__ std::uint32_t tokens(std::uint32_t place) const {
    return base + stage(place) * T::kStageBytes;
  }
  __device__ std::uint32_t weights(std::uint32_t place) const {
    return tokens(place) + T::kTokenBytes;
  }
  __device__ std::uint32_t zero_points(std::uint32_t place) const {
    return base + T::kGridsOffset + stage(place) * T::kGridsBytes;
  }
  __device__ std::uint32_t scales(std::uint32_t place) const {
    return zero_points(place) + T::kGridBytes;
  }
  /// Ends a round when what was asked for has come.
  __device__ std::uint32_t full(std::uint32_t place) const {
    return base + T::kBarriersOffset + stage(place) * 8;
  }
  /// Ends a round when all warps that read the stage, of the whole cluster, have done so.
  __device__ std::uint32_t empty(std::uint32_t place) const { return full(place) + kMaxStages * 8; }
  /// sharing: blocks that fetch tokens for each other.
  __device__ void init(int sharing) const {
    for (int i = 0; i < T::kStages; ++i) {
      init_barrier(full(i), 1);
      init_barrier(empty(i), T::kConsumers * 4 * sharing);
    }
    publish_barriers();
  }
  /// By a warp that has read it, to the blocks from first_rank on.
  __device__ void free(std::uint32_t place, int first_rank, int sharing) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    if (lane < sharing) {
      release_to(empty(place), first_rank + lane);
    }
  }
};

/// Fetches the steps of a tile, one after the other.
template <typename T>
struct WgmmaProducer {
  const WgmmaRing<T> ring;
  const WgmmaMaps& maps;
  const DeviceLayout& layout;
  const int rank;             ///< among the blocks that share tokens
  const int sharing;          ///< so many
  const std::uint16_t ranks;  ///< a bit for each of them

  __device__ void fetch_weights(const WgmmaPlace& tile, int step, std::uint32_t place) const {
    const bool asymmetric = T::kElementBytes == 1 && layout.asymmetric;
    const std::uint32_t barrier = ring.full(place);
    expect_bytes(barrier, T::kStageBytes + (T::kGroups ? T::kGridBytes : 0) +
                              (asymmetric ? T::kGridBytes : 0));
    copy_box(ring.weights(place), maps.weight, step * 256, tile.row_block, barrier);
    if (T::kGroups || asymmetric) {
      const int group =
          T::kGroups ? static_cast<int>(step * kStepCols / layout.group_size) * kBlockRows : 0;
      if (T::kGroups) {
        copy_box(ring.scales(place), maps.scales, group, tile.row_block, barrier);
      }
      if (asymmetric) {
        copy_box(ring.zero_points(place), maps.zero_points, group, tile.row_block, barrier);
      }
    }
  }
  __device__ void fetch_tokens(const WgmmaPlace& tile, int step, std::uint32_t place) const {
    if (sharing == 1) {
      copy_box(ring.tokens(place), maps.tokens, step * kStepCols, tile.token, ring.full(place));
    } else {
      copy_box_to(ranks, ring.tokens(place) + rank * (T::kTokenBytes / sharing), maps.tokens,
                  step * kStepCols, tile.token + rank * (T::kTokens / sharing), ring.full(place));
    }
  }
};

/// Numbers of rows g and g + 8 of a row block.
__device__ inline float2 load_row_pair(std::uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.f32 %0, [%2]; ld.shared.f32 %1, [%2 + 32];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(address)
               : "memory");
  return pair;
}

/// A lane's weights of half a step, as they are stored, and their grids.
template <typename T>
struct WgmmaWeights {
  uint4 bytes[T::kElementBytes];
  std::uint32_t zero[2];
  float2 scale;

  /// `slot`: which of the step's groups it is.
  __device__ __forceinline__ void load(const WgmmaRing<T>& ring, bool asymmetric,
                                       std::uint32_t place, int half, int slot, int row_block) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const std::uint32_t blocks =
        ring.weights(place) + lane * 16 +
        (row_block * T::kStepBlocks + half * T::kElementBytes) * kBlockBytes;
#pragma unroll
    for (int i = 0; i < T::kElementBytes; ++i) {
      bytes[i] = load_lane(blocks + i * kBlockBytes);
    }
    const std::uint32_t grid = (row_block * T::kGridGroups + slot) * kBlockRows * 4 + lane / 4 * 4;
    zero[0] = zero[1] = zero_pair<T::kBFloat16>(0.0F);
    if (T::kElementBytes == 1 && asymmetric) {
      const float2 points = load_row_pair(ring.zero_points(place) + grid);
      zero[0] = zero_pair<T::kBFloat16>(points.x);
      zero[1] = zero_pair<T::kBFloat16>(points.y);
    }
    if constexpr (T::kGroups) {
      scale = load_row_pair(ring.scales(place) + grid);
    }
  }

  /// The registers of the first or the last 16 columns.
  __device__ __forceinline__ void convert(int sixteen, std::uint32_t (&a)[4]) const {
    if constexpr (T::kElementBytes == 1) {
      std::uint32_t upper[2];
      std::uint32_t lower[2];
      cuda::convert<T::kBFloat16>(sixteen == 0 ? bytes[0].x : bytes[0].y, zero[0], upper);
      cuda::convert<T::kBFloat16>(sixteen == 0 ? bytes[0].z : bytes[0].w, zero[1], lower);
      a[0] = upper[0];
      a[1] = lower[0];
      a[2] = upper[1];
      a[3] = lower[1];
    } else {
      a[0] = bytes[sixteen].x;
      a[1] = bytes[sixteen].z;
      a[2] = bytes[sixteen].y;
      a[3] = bytes[sixteen].w;
    }
  }
};

/// A warpgroup's part of a tile: the sums of 64 rows by kTokens tokens.
template <typename T>
struct WgmmaSums {
  float sums[T::kTokens / 2];
  float totals[T::kGroups ? T::kTokens / 2 : 1];

  __device__ __forceinline__ float result(int i) const {
    if constexpr (T::kGroups) {
      return totals[i];
    } else {
      return sums[i];
    }
  }

  /// Multiplies the steps [first, last), which lie in the ring from `place` on, by the rows of a
  /// warp's row block of the tile. Groups are scaled; where a row has one scale, sums are not.
  /// Blocks from first_rank of the cluster on share the tokens.
  ///
  /// Products are under way while the registers of the next are made, those of one that has ended:
  /// two of them, but one where sums are taken away between (measured).
  __device__ __forceinline__ void multiply(const WgmmaRing<T>& ring, const DeviceLayout& layout,
                                           int first, int last, std::uint32_t place, int row_block,
                                           int first_rank, int sharing) {
    const bool asymmetric = T::kElementBytes == 1 && layout.asymmetric;
    const int group_halves = T::kGroups ? static_cast<int>(layout.group_size) / kHalfCols : 0;
    int halves_left = T::kGroups ? group_halves - 2 * first % group_halves : 0;
    if constexpr (T::kGroups) {
#pragma unroll
      for (float& total : totals) {
        total = 0.0F;
      }
    }
    constexpr int kUnderWay = T::kGroups ? 1 : 2;
    WgmmaWeights<T> weights[2];
    std::uint32_t a[4][4];
    wait_barrier(ring.full(place), ring.round(place));
    weights[0].load(ring, asymmetric, place, 0, 0, row_block);
    weights[0].convert(0, a[0]);
    int keeps = 0;
    for (int step = first; step < last; ++step, ++place) {
      const std::uint64_t tokens = token_descriptor(ring.tokens(place));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
          const int product = 2 * half + sixteen;
          begin_products();
          multiply_tokens<T::kBFloat16>(sums, a[product], tokens + 2 * product,
                                        sixteen == 0 ? keeps : 1);
          close_products();
          wait_products<kUnderWay>();
          if (sixteen + 1 == kUnderWay) {
            // The last product of the half before has ended, and its weights are not needed.
            if (half == 0) {
              if (step > first) {
                ring.free(place - 1, first_rank, sharing);
              }
              weights[1].load(ring, asymmetric, place, 1, halves_left == 1 ? 1 : 0, row_block);
            } else if (step + 1 < last) {
              wait_barrier(ring.full(place + 1), ring.round(place + 1));
              weights[0].load(ring, asymmetric, place + 1, 0, 0, row_block);
            }
          }
          weights[sixteen == 0 ? half : half ^ 1].convert(sixteen ^ 1, a[(product + 1) % 4]);
        }
        keeps = 1;
        if (T::kGroups && --halves_left == 0) {
          wait_products<0>();
          add_group(weights[half].scale);
          halves_left = group_halves;
          keeps = 0;
        }
      }
    }
    wait_products<0>();
    ring.free(place - 1, first_rank, sharing);
    if (T::kGroups && keeps != 0) {
      add_group(weights[1].scale);
    }
  }

  __device__ __forceinline__ void add_group(const float2& scale) {
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) {
      totals[i] = fmaf(sums[i], i % 4 / 2 == 0 ? scale.x : scale.y, totals[i]);
    }
  }
};

#endif

}  // namespace moq::kernels::cuda
