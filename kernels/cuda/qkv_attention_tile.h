#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/attention_products.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_wgmma_sums.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/vectors.h"

/// The projection of qkv_attention: 64 rows of the weight, a head's of q, k or v, by 64 tokens of a
/// sequence, to shared memory. Device code, and the sizes that a launch needs.
namespace moq::kernels::cuda {

constexpr int kHeadDim = 64;  // a tile's rows
constexpr int kHeadTokens = 64;
constexpr int kMostTokenTiles = 2;  // of a sequence
constexpr int kKinds = 3;           // q, k, v
constexpr int kTokenRowBytes = kQueryRowBytes<kHeadDim>;
static_assert(kTokenRowBytes == TileLayout<false, kHeadDim>::kRowBytes);
constexpr int kTileBytes = kHeadTokens * kTokenRowBytes;  // q, k or v of a tile's tokens

/// A tile of wgmma_linear, with room for the keys and values of a sequence.
template <bool kBFloat16, int kElementBytes, int kWarpgroups_>
struct HeadTile
    : WgmmaTileOf<kBFloat16, kElementBytes, false, WgmmaArrangement<1, kHeadTokens, false>> {
  using Base =
      WgmmaTileOf<kBFloat16, kElementBytes, false, WgmmaArrangement<1, kHeadTokens, false>>;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kInterleave = kWarpgroups;
  static constexpr bool kFirstApart = true;
  static constexpr int kConsumerThreads = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpSize;
  static constexpr int kBlocks = kWarpgroups == 1 ? 2 : 1;  // of a multiprocessor
  static constexpr int kKeyBytes = kMostTokenTiles * 2 * kTileBytes;
  // Half of a multiprocessor: beside one block there is room for one of the next kernel.
  static constexpr int kRoom =
      kHopperSharedBytes / 2 - kReservedBytes - kKeyBytes - Base::kBarrierBytes;
  static constexpr int kStages =
      std::min(kRoom / Base::kStageBytes, kMaxStages) / kInterleave * kInterleave;
  static constexpr int kKeysOffset = kStages * Base::kStageBytes;
  static constexpr int kBarriersOffset = kKeysOffset + kKeyBytes;
  static constexpr int kBlockShared = kBarriersOffset + Base::kBarrierBytes;
  static_assert(kStages >= 3 && kTileBytes <= Base::kStageBytes && kInterleave <= kMaxInterleave);

  /// What the second warpgroup hands to the first, four numbers a thread and row, lies in stages
  /// that only the second reads: every second one, from the second on.
  static constexpr int kHandedRowBytes = kWarpgroup * 16;
  static constexpr int kHandedRowsOfStage = Base::kStageBytes / kHandedRowBytes;
  static constexpr int kHandedRows = kHeadTokens / 2 / 4 + 1;
  static_assert(kWarpgroups == 1 || kStages / 2 * kHandedRowsOfStage >= kHandedRows);
};

/// What the kernel gets besides tensor maps and the weight's layout. Plain data.
struct HeadArgs {
  const void* weight;
  const void* bias;
  const DeviceSequence* sequences;
  const float* alibi_slopes;
  void* output;
  std::int64_t output_stride;
  NextWeight next;
  int num_heads;
  int steps;        ///< of kStepCols columns
  int token_tiles;  ///< of the longest sequence
  int token_bytes;  ///< of a step
  float scale;
  bool causal;
  bool weight_is_ready;
  bool past_is_ready;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Numbers of barriers: of each warpgroup, and of both.
constexpr int kFirstBarrier = 1;
constexpr int kSecondBarrier = 2;
constexpr int kAllBarrier = 3;

/// Four numbers of this thread of a warpgroup, in row i of what the second hands to the first.
template <typename T>
__device__ __forceinline__ float4* handed(std::uint8_t* ring, int i) {
  const int stage = 1 + i / T::kHandedRowsOfStage * 2;
  return reinterpret_cast<float4*>(ring + stage * T::kStageBytes +
                                   i % T::kHandedRowsOfStage * T::kHandedRowBytes) +
         threadIdx.x % kWarpgroup;
}

/// Fetches the steps of the warpgroups in turn: those of a later one are behind all of an earlier.
template <typename T>
__device__ __forceinline__ void fetch_in_turn(const WgmmaProducer<T>& producer,
                                              const WgmmaPlace& place, const HeadArgs& args) {
  constexpr int kTurns = T::kWarpgroups;
  const int steps = args.steps;
  const int rounds = (steps + kTurns - 1) / kTurns;  // of the last one, which has the most
  const auto step_of = [&](int i) {
    const int group = i % kTurns;
    const int step = steps * group / kTurns + i / kTurns;
    return step < steps * (group + 1) / kTurns ? step : -1;
  };
  prefetch_map(producer.maps.tokens);
  const int early = args.weight_is_ready ? min(rounds * kTurns, T::kStages) : 0;
  for (int i = 0; i < early; ++i) {
    if (step_of(i) >= 0) {
      producer.fetch_weights(place, step_of(i), i, /*first=*/true);
    }
  }
  bring(args.next);
  wait_for_previous_kernels();
  std::uint32_t stage = 0;
  std::uint32_t parity = 0;
  for (int i = 0; i < rounds * kTurns; ++i) {
    if (const int step = step_of(i); step >= 0) {
      if (i >= early) {
        wait_barrier(producer.ring.empty(stage), parity ^ 1);
        producer.fetch_weights(place, step, stage, i < T::kStages);
      }
      producer.fetch_tokens(place, step, stage);
    }
    if (++stage == T::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

/// Steps of a warpgroup.
template <typename T>
__device__ __forceinline__ int own_steps(int group, int steps) {
  return steps * (group + 1) / T::kWarpgroups - steps * group / T::kWarpgroups;
}

/// Makes the registers of the first step of this warpgroup.
template <typename T>
__device__ __forceinline__ void begin_in_turn(const WgmmaRing<T>& ring, int group, int steps,
                                              const std::uint32_t (&zero)[2], WgmmaSums<T>& sums) {
  if (own_steps<T>(group, steps) > 0) {
    sums.begin(ring, {.stage = static_cast<std::uint32_t>(group)},
               static_cast<int>(threadIdx.x) / kWarpSize % 4, zero);
  }
}

/// Multiplies the columns of this warpgroup, and adds what the second has to the first's sums.
template <typename T>
__device__ __forceinline__ void multiply_in_turn(std::uint8_t* shared, const WgmmaRing<T>& ring,
                                                 int group, int steps,
                                                 const std::uint32_t (&zero)[2],
                                                 WgmmaSums<T>& sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
  if (const int own = own_steps<T>(group, steps); own > 0) {
    WgmmaSlot<T> slot{.stage = static_cast<std::uint32_t>(group)};
    sums.multiply(ring, slot, own, warp, zero);
  } else {
#pragma unroll
    for (float& sum : sums.sums) {
      sum = 0.0F;
    }
  }
  // The stages have been read. (By a number known only at run time, all 16 barriers would be
  // taken.)
  group == 0 ? meet<kWarpgroup>(kFirstBarrier) : meet<kWarpgroup>(kSecondBarrier);
  if constexpr (T::kWarpgroups == 2) {
    constexpr int kQuads = kHeadTokens / 2 / 4;
    if (group == 1) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        *handed<T>(shared, i) = float4{sums.sums[4 * i], sums.sums[4 * i + 1], sums.sums[4 * i + 2],
                                       sums.sums[4 * i + 3]};
      }
    }
    meet<T::kConsumerThreads>(kAllBarrier);
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const float4 other = *handed<T>(shared, i);
        sums.sums[4 * i] += other.x;
        sums.sums[4 * i + 1] += other.y;
        sums.sums[4 * i + 2] += other.z;
        sums.sums[4 * i + 3] += other.w;
      }
    }
  }
}

/// Sums of 64 rows and tokens, scaled and rounded, to shared memory: [token][row].
template <typename T>
__device__ __forceinline__ void store_tile(std::uint32_t tile, const WgmmaSums<T>& sums,
                                           const float2& scale, const float2& bias) {
  using Element = typename ElementOf<T::kBFloat16>::Type;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // The lane's row of four matrices: 0 and 1 are rows 0 to 7 and 8 to 15 of eight tokens, 2 and 3
  // of the eight behind.
  const std::uint32_t own =
      tile + (lane / 16 * 8 + lane % 8) * kTokenRowBytes + (warp * 2 + lane / 8 % 2) * 16;
#pragma unroll
  for (int i = 0; i < kHeadTokens / 16; ++i) {
    std::uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float factor = w % 2 == 0 ? scale.x : scale.y;
      const float added = w % 2 == 0 ? bias.x : bias.y;
      words[w] = rounded_pair<Element>(sums.sums[8 * i + 2 * w] * factor + added,
                                       sums.sums[8 * i + 2 * w + 1] * factor + added);
    }
    store_transposed(own + i * 16 * kTokenRowBytes, words);
  }
}

#endif

}  // namespace moq::kernels::cuda
