#pragma once

#include <cstdint>

#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/linear_wgmma_write.h"
#include "kernels/cuda/ptx.h"

/// How the blocks of a cluster that share the columns of a tile add up what they have, and write
/// it. Device code only.
///
/// The tile's tokens are shared among them, or among the first two of them, which finish the same
/// number each. The others send those their sums, which their lanes find where they left them, and
/// they add them in the order of the columns. Nobody waits but for what it is sent, and a block may
/// end while its own is under way.
namespace moq::kernels::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Sends the block's sums of all shares but its own to those that finish them. target: of the
/// thread, in their shared memory; part, received: as of write_share.
template <typename T, int kShares, typename Sums>
__device__ __forceinline__ void send_shares(const Sums& sums, std::uint32_t target,
                                            std::uint32_t received, int part) {
  constexpr int kOwn = T::kTokens / kShares / 2;
#pragma unroll
  for (int p = 0; p < kShares; ++p) {
    if (p != part) {
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        const int first = p * kOwn + i;
        send_to_cluster(target + i * kWarpgroup * 4,
                        float4{sums.result(first), sums.result(first + 1), sums.result(first + 2),
                               sums.result(first + 3)},
                        received, p);
      }
    }
  }
}

/// What writes a block's share, four tokens of a lane at once. It can be made, and load what is
/// added to the first of them, before the columns are multiplied.
template <typename T>
using WgmmaShareWriter = WgmmaWriter<T::kBFloat16, 4>;

/// split: blocks of the cluster, kShares or, if T::kAnyParts, any number from there on; part: of
/// the columns, as the block's rank in the cluster; writer: of its share; results: of the
/// warpgroup, the same place in every block, with room for a share from each of them, one behind
/// the other; received: its barrier.
template <typename T, int kShares, typename Sums>
__device__ __forceinline__ void write_share(int split, WgmmaShareWriter<T>& writer, float* results,
                                            const Sums& sums, const float2& scale, int barrier,
                                            std::uint32_t received, int part) {
  constexpr bool kFewShares = kShares > 1 && T::kAnyParts;
  constexpr int kShare = T::kTokens / kShares;  // tokens
  constexpr int kOwn = kShare / 2;              // sums of a lane
  constexpr int kSteps = kShare / kTokenStep;
  constexpr int kCount = kSteps % 4 == 0 ? 4 : kSteps % 3 == 0 ? 3 : kSteps % 2 == 0 ? 2 : 1;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  float* const place = results + part * kShare * kGroupRows;  // of this block's part
  const std::uint32_t target = shared_address(place + thread * 4);
  if (kFewShares && part >= kShares) {
    wait_for_cluster();
    send_shares<T, kShares>(sums, target, received, part);
    return;
  }
  float total[kOwn];
  with_index<kShares>(part, [&]<int kPart>() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      total[i] = sums.result(kPart * kOwn + i);
    }
  });
  wait_for_cluster();  // the barriers of all blocks have been made
  if constexpr (kShares > 1) {
    send_shares<T, kShares>(sums, target, received, part);
    wait_barrier(received, 0);
    float added[kOwn] = {};
    const auto add = [&](int p) {
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        float4 theirs{total[i], total[i + 1], total[i + 2], total[i + 3]};
        if (p != part) {
          theirs =
              *reinterpret_cast<const float4*>(results + (p * kOwn + i) * kWarpgroup + thread * 4);
        }
        added[i] += theirs.x;
        added[i + 1] += theirs.y;
        added[i + 2] += theirs.z;
        added[i + 3] += theirs.w;
      }
    };
#pragma unroll
    for (int p = 0; p < kShares; ++p) {
      add(p);
    }
    if constexpr (kFewShares) {
#pragma unroll 1
      for (int p = kShares; p < split; ++p) {
        add(p);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      total[i] = added[i];
    }
  }

  // Where nobody sends anything: [token, row], rows exchanged so that no two lanes meet in a bank.
  const int t = thread % 4;
  const int row = thread / kWarpSize * kBlockRows + thread % kWarpSize / 4;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const bool upper = i % 4 / 2 == 0;
    place[(i / 4 * 8 + 2 * t + i % 2) * kGroupRows + ((upper ? row : row + 8) ^ t * 8)] =
        total[i] * (upper ? scale.x : scale.y);
  }
  meet<kWarpgroup>(barrier);
  static_assert(kTokenStep == 8);
  const int token = thread / kQuads;
  const float* quad = place + token * kGroupRows + (thread % kQuads * kQuad ^ token / 2 * 8);
#pragma unroll 1
  for (int first = 0; first < kShare; first += kCount * kTokenStep) {
    if (first > 0) {
      writer.load(first, kShare);
    }
    float4 numbers[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      numbers[u] = *reinterpret_cast<const float4*>(quad + (first + u * kTokenStep) * kGroupRows);
    }
    writer.write(first, numbers);
  }
}

/// As many shares as there are: 1, 2, 4 or 8, if T::kAnyParts 1 or 2.
template <typename T, typename... Arguments>
__device__ __forceinline__ void write_share(int split, WgmmaShareWriter<T>& writer,
                                            const Arguments&... arguments) {
  if (split == 1) {
    return write_share<T, 1>(split, writer, arguments...);
  }
  if constexpr (T::kMostShares > 2) {
    if (split == 2) {
      return write_share<T, 2>(split, writer, arguments...);
    }
  }
  if constexpr (T::kMostShares > 4) {
    if (split == 4) {
      return write_share<T, 4>(split, writer, arguments...);
    }
  }
  write_share<T, T::kMostShares>(split, writer, arguments...);
}

#endif

}  // namespace moq::kernels::cuda
