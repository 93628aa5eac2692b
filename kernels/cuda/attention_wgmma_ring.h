#pragma once

#include <cstdint>

#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/warp.h"
#include "kernels/cuda/wgmma.h"

/// How wide_attention shares rows out and brings queries, keys and values to shared memory. Device
/// code only.
namespace moq::kernels::cuda {

constexpr int kBlockDims = 32;
constexpr int kBlockRowBytes = kBlockDims * 2;

/// Whether blocks take more rows at once where there are many: they read fewer keys for each.
template <int kDim>
constexpr bool kKnowsMany = kDim == 64 || kDim == 128;

/// kDim: head_dim, rounded up to a compiled one. kMany: rows.
template <int kDim, bool kMany>
struct Wide {
  static_assert(!kMany || kKnowsMany<kDim>);
  // Warpgroups that multiply.
  static constexpr int kConsumers = !kMany ? 2 : kDim == 64 ? 4 : 3;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kRows = kConsumers * kGroupRows;
  static constexpr int kKeys = kMany || kDim > 160 ? 64 : 128;  // of a tile: whole pages
  static constexpr int kStages = !kMany ? 2 : kDim == 64 ? 4 : 3;
  static constexpr int kDimBlocks = (kDim + kBlockDims - 1) / kBlockDims;
  static constexpr int kQueryBytes = kDimBlocks * kRows * kBlockRowBytes;
  static constexpr int kTileBytes = kDimBlocks * kKeys * kBlockRowBytes;  // of keys, or of values
  static constexpr int kRingOffset = kQueryBytes;
  static constexpr int kSightOffset = kRingOffset + 2 * kStages * kTileBytes;
  static constexpr int kBarrierOffset = kSightOffset + kRows * static_cast<int>(sizeof(Sight));
  static constexpr int kSharedBytes = kBarrierOffset + (4 * kStages + 1) * 8;
  /// Of a thread, of the 168 that three warpgroups start with, the 128 of four or the 96 of five.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 112;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Barriers of the queries and of the ring, where keys (kind 0) and values (1) have a place each.
template <typename Sizes>
struct WideRing {
  std::uint32_t shared;

  __device__ std::uint32_t queries_full() const {
    return shared + Sizes::kBarrierOffset + 4 * Sizes::kStages * 8;
  }
  __device__ std::uint32_t full(int stage, int kind) const {
    return shared + Sizes::kBarrierOffset + (2 * stage + kind) * 8;
  }
  __device__ std::uint32_t empty(int stage, int kind) const {
    return full(stage, kind) + 2 * Sizes::kStages * 8;
  }
  __device__ std::uint32_t tile(int stage, int kind) const {
    return shared + Sizes::kRingOffset + (2 * stage + kind) * Sizes::kTileBytes;
  }
  __device__ void init() const {
    for (int stage = 0; stage < Sizes::kStages; ++stage) {
      for (int kind = 0; kind < 2; ++kind) {
        init_barrier(full(stage, kind), kWarpgroup);
        init_barrier(empty(stage, kind), Sizes::kConsumers * kWarpgroup / kWarpSize);
      }
    }
    init_barrier(queries_full(), kWarpgroup);
    publish_barriers();
  }
  /// Waits for what the copies of the other warpgroup wrote, which products may read then.
  __device__ static void wait_full(std::uint32_t barrier, int parity) {
    wait_barrier(barrier, parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  /// By a warp that has read it.
  __device__ void free(int stage, int kind) const {
    if (threadIdx.x % kWarpSize == 0) {
      arrive(empty(stage, kind));
    }
  }
};

/// Lets the barrier count this thread when the copies that it has begun are there.
__device__ inline void arrive_behind_copies(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// What all threads of a block know.
struct WideWork {
  DeviceSequence sequence;
  int kv_head;
  int group;
  int past;
  int keys;   ///< of the sequence
  int tiles;  ///< of keys that the block's rows see
};

/// Brings the queries of a block, then keys and values.
template <int kDim, typename Sizes>
__device__ __forceinline__ void produce(const DeviceAttentionArgs& args, const WideWork& work,
                                        const RowMap& map, const WideRing<Sizes>& ring) {
  constexpr int kChunks = kBlockRowBytes / 16;  // of a block's row
  constexpr int kRowStep = kWarpgroup / kChunks;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int own_row = thread / kChunks;
  const int own_chunk = thread % kChunks;
  const std::uint32_t place = own_row * kBlockRowBytes + swizzle64(own_row, own_chunk) * 16;
  const int head_chunks = static_cast<int>(args.head_dim) / 8;
  // This thread's pieces of 16 bytes of a row that begins at `row`. Of what does not exist nothing
  // is read; zeros stand for it.
  const auto copy_row = [&](std::uint32_t target, int block_bytes, const char* row, bool exists) {
#pragma unroll
    for (int block = 0; block < Sizes::kDimBlocks; ++block) {
      const int chunk = block * kChunks + own_chunk;
      if (kDim % kBlockDims == 0 || chunk < kDim / 8) {
        copy_async(target + block * block_bytes, row + block * kBlockRowBytes,
                   exists && chunk < head_chunks);
      }
    }
  };
#pragma unroll 1
  for (int i = 0; i < Sizes::kRows; i += kRowStep) {
    const RowMap::Place row = map.at(i + own_row);
    const bool exists = row.token < work.sequence.num_tokens;
    const std::int64_t place_of_row =
        (work.sequence.token_begin + static_cast<std::int64_t>(row.token)) * args.query_stride +
        (work.kv_head * work.group + row.head) * args.head_dim;
    copy_row(ring.shared + place + i * kBlockRowBytes, Sizes::kRows * kBlockRowBytes,
             static_cast<const char*>(args.query) + place_of_row * 2 + own_chunk * 16, exists);
  }
  arrive_behind_copies(ring.queries_full());

  constexpr int kPages = Sizes::kKeys / static_cast<int>(kPageTokens);
  const auto pages_of = [&](int tile, std::int32_t(&pages)[kPages]) {
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int first = tile * Sizes::kKeys + i * static_cast<int>(kPageTokens);
      pages[i] = first < work.keys ? page_of(args, work.sequence, first) : 0;
    }
  };
  std::int32_t pages[kPages];
  pages_of(0, pages);
  int stage = 0;
  int parity = 1;
  for (int tile = 0; tile < work.tiles; ++tile) {
    std::int32_t next_pages[kPages];
    pages_of(tile + 1, next_pages);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      wait_barrier(ring.empty(stage, kind), parity);
#pragma unroll
      for (int i = 0; i < kPages; ++i) {
        const int first = tile * Sizes::kKeys + i * static_cast<int>(kPageTokens);
        const KeySource source =
            keys_from<false>(args, work.sequence, work.kv_head, pages[i], first);
        const char* row =
            (kind == 0 ? source.keys : source.values) + own_row * source.row_bytes + own_chunk * 16;
#pragma unroll
        for (int j = 0; j < static_cast<int>(kPageTokens); j += kRowStep) {
          copy_row(ring.tile(stage, kind) + place +
                       (i * static_cast<int>(kPageTokens) + j) * kBlockRowBytes,
                   Sizes::kKeys * kBlockRowBytes, row, first + j + own_row < work.keys);
          row += kRowStep * source.row_bytes;
        }
      }
      arrive_behind_copies(ring.full(stage, kind));
    }
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      pages[i] = next_pages[i];
    }
    stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
    parity ^= stage == 0 ? 1 : 0;
  }
}

#endif

}  // namespace moq::kernels::cuda
