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
constexpr bool kKnowsMany = kDim == 64 || kDim == 128 || kDim == 160;

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

/// Writes zeros where dimensions from head_dim on are in the ring: copies of pages leave them
/// alone. All threads of a block share the work, and have to meet before anything is multiplied.
template <int kDim, typename Sizes>
__device__ __forceinline__ void clear_padding(const WideRing<Sizes>& ring, int head_dim) {
  constexpr int kChunks = kBlockRowBytes / 16;
  for (int chunk = head_dim / 8; chunk < kDim / 8; ++chunk) {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * Sizes::kStages * Sizes::kKeys;
         i += Sizes::kThreads) {
      const int row = i % Sizes::kKeys;
      store_shared_quad(ring.tile(0, 0) + i / Sizes::kKeys * Sizes::kTileBytes +
                            chunk / kChunks * Sizes::kKeys * kBlockRowBytes + row * kBlockRowBytes +
                            swizzle64(row, chunk % kChunks) * 16,
                        uint4{});
    }
  }
}

/// A thread's pieces of 16 bytes of rows that lie anywhere: of every 32nd row, in each block of
/// dimensions one. Of what does not exist nothing is read; zeros stand for it.
template <int kDim, typename Sizes>
class RowPieces {
 public:
  static constexpr int kChunks = kBlockRowBytes / 16;  // of a block's row
  static constexpr int kStep = kWarpgroup / kChunks;   // rows

  __device__ explicit RowPieces(int head_dim)
      : row_(static_cast<int>(threadIdx.x) % kWarpgroup / kChunks),
        chunk_(static_cast<int>(threadIdx.x) % kChunks),
        place_(row_ * kBlockRowBytes + swizzle64(row_, chunk_) * 16),
        head_chunks_(head_dim / 8) {}

  __device__ int first_row() const { return row_; }
  /// This thread's first piece of a row that begins at `row`.
  __device__ const char* piece_of(const void* row) const {
    return static_cast<const char*>(row) + chunk_ * 16;
  }

  /// A row, from its first piece on. target: of first_row of the first thread.
  template <int kBlockBytes>
  __device__ __forceinline__ void copy_row(std::uint32_t target, const char* piece,
                                           bool exists) const {
#pragma unroll
    for (int block = 0; block < Sizes::kDimBlocks; ++block) {
      const int chunk = block * kChunks + chunk_;
      if (kDim % kBlockDims == 0 || chunk < kDim / 8) {
        copy_async(target + place_ + block * kBlockBytes, piece + block * kBlockRowBytes,
                   exists && chunk < head_chunks_);
      }
    }
  }

  /// As many rows as a page has, of which the first `existing` exist.
  __device__ __forceinline__ void copy_page(std::uint32_t target, const char* rows,
                                            std::int64_t row_bytes, int existing) const {
    const char* piece = piece_of(rows + row_ * row_bytes);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kPageTokens); i += kStep) {
      copy_row<Sizes::kKeys * kBlockRowBytes>(target + i * kBlockRowBytes, piece,
                                              i + row_ < existing);
      piece += kStep * row_bytes;
    }
  }

 private:
  int row_;
  int chunk_;
  std::uint32_t place_;
  int head_chunks_;
};

/// A thread's pieces of 16 bytes of a page, every 128th: a head's rows lie side by side there, and
/// a warp's pieces are 512 bytes in a row, wherever rows begin.
template <int kDim, typename Sizes>
class PagePieces {
 public:
  __device__ explicit PagePieces(int head_dim) : head_chunks_(head_dim / 8) {
    constexpr int kChunks = kBlockRowBytes / 16;
    const float inverse = 1.0F / static_cast<float>(head_chunks_);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int piece = thread() + i * kWarpgroup;
      const int row = divide(piece, inverse);
      const int chunk = piece - row * head_chunks_;
      const int place = chunk / kChunks * Sizes::kKeys * kBlockRowBytes + row * kBlockRowBytes +
                        swizzle64(row, chunk % kChunks) * 16;
      // Two in a register, of which there are few.
      places_[i / 2] = (i % 2 == 0 ? 0 : places_[i / 2]) | place / 16 << i % 2 * 16;
    }
  }

  /// A page, of which the first `existing` rows exist; zeros stand for the others.
  __device__ __forceinline__ void copy_page(std::uint32_t target, const char* source,
                                            std::int64_t /*row_bytes*/, int existing) const {
    source += thread() * 16;
    // Else the compiler keeps a pointer for each piece, and runs out of registers.
    asm volatile("" : "+l"(source));
    const int all = static_cast<int>(kPageTokens) * head_chunks_ - thread();
    const int real = existing * head_chunks_ - thread();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i * kWarpgroup < all) {
        const std::uint32_t place = places_[i / 2] >> i % 2 * 16 & 0xffffU;
        copy_async(target + place * 16, source + i * kWarpgroup * 16, i * kWarpgroup < real);
      }
    }
  }

 private:
  static constexpr int kCount = static_cast<int>(kPageTokens) * kDim / 8 / kWarpgroup;
  __device__ static int thread() {
    return static_cast<int>(threadIdx.x) % kWarpgroup;
  }

  int head_chunks_;
  std::uint32_t places_[(kCount + 1) / 2];  ///< in units of 16 bytes
};

/// Brings keys and values, by RowPieces or PagePieces.
template <typename Sizes, typename Pieces>
__device__ __forceinline__ void produce_keys(const DeviceAttentionArgs& args, const WideWork& work,
                                             const WideRing<Sizes>& ring, const Pieces& pieces) {
  constexpr int kPage = static_cast<int>(kPageTokens);
  constexpr int kPages = Sizes::kKeys / kPage;
  const auto pages_of = [&](int tile, std::int32_t(&pages)[kPages]) {
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int first = tile * Sizes::kKeys + i * kPage;
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
        const int first = tile * Sizes::kKeys + i * kPage;
        const KeySource source =
            keys_from<false>(args, work.sequence, work.kv_head, pages[i], first);
        pieces.copy_page(ring.tile(stage, kind) + i * kPage * kBlockRowBytes,
                         kind == 0 ? source.keys : source.values, source.row_bytes,
                         work.keys - first);
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

/// Brings the queries of a block, then keys and values.
template <int kDim, typename Sizes>
__device__ __forceinline__ void produce(const DeviceAttentionArgs& args, const WideWork& work,
                                        const RowMap& map, const WideRing<Sizes>& ring) {
  using Rows = RowPieces<kDim, Sizes>;
  const auto head_dim = static_cast<int>(args.head_dim);
  const Rows rows(head_dim);
#pragma unroll 1
  for (int i = 0; i < Sizes::kRows; i += Rows::kStep) {
    const RowMap::Place row = map.at(i + rows.first_row());
    const std::int64_t place =
        (work.sequence.token_begin + static_cast<std::int64_t>(row.token)) * args.query_stride +
        (work.kv_head * work.group + row.head) * args.head_dim;
    rows.template copy_row<Sizes::kRows * kBlockRowBytes>(
        ring.shared + i * kBlockRowBytes,
        rows.piece_of(static_cast<const char*>(args.query) + place * 2),
        row.token < work.sequence.num_tokens);
  }
  arrive_behind_copies(ring.queries_full());
  if (args.pages.keys == nullptr) {
    return produce_keys(args, work, ring, rows);
  }
  produce_keys(args, work, ring, PagePieces<kDim, Sizes>(head_dim));
}

#endif

}  // namespace moq::kernels::cuda
