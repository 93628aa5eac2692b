#pragma once

#include "kernels/cuda/decode_step_layout.h"
#include "kernels/cuda/ptx.h"

/// How weights and cached keys come to the warps that multiply: through a ring of stages in shared
/// memory, which one lane of a thread block fills by bulk copies. Device code only.
namespace moq::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

struct Ring {
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
};

/// What the lane that fills the ring looks up. (In shared memory: the fences of the exchange empty
/// the cache of global memory.)
struct Sources {
  const std::uint8_t* weights[kMaxLayers * kProjections];
  std::int32_t pages[kHeldPages];  ///< from that of the thread block's first key
  std::int16_t units[kProjections][2];
};

/// A consuming warp's place in the ring.
struct Stages {
  std::uint32_t first_full;
  std::uint32_t first_empty;
  std::uint32_t first_stage;
  std::uint32_t full;
  std::uint32_t stage;
  std::uint32_t released;
  std::uint32_t parity = 0;

  __device__ Stages(const Ring& ring, std::uint32_t stages)
      : first_full(shared_address(ring.full)),
        first_empty(shared_address(ring.empty)),
        first_stage(stages),
        full(first_full),
        stage(stages),
        released(first_empty) {}

  /// Until the stage is filled. (All lanes leave at once, see Patience.)
  __device__ __forceinline__ void wait() const {
    std::uint32_t done = 0;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(full), "r"(parity)
          : "memory");
    } while (!__all_sync(kWholeWarp, done != 0));
  }
  /// Goes on to the next stage.
  __device__ __forceinline__ void advance() {
    full += 8;
    stage += kStageBytes;
    if (full == first_full + 8 * kStages) {
      full = first_full;
      stage = first_stage;
      parity ^= 1;
    }
  }
  /// Gives the oldest stage back. What was read of it has been used: a load that is only on its way
  /// may find the next contents. (Each lane says so of its own loads: measured on an H100, that is
  /// faster than one of them that waits for the others, and racecheck follows it.)
  __device__ __forceinline__ void release() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(released) : "memory");
    released += 8;
    if (released == first_empty + 8 * kStages) {
      released = first_empty;
    }
  }
};

/// Which keys of which head a thread block attends to.
struct KeySpan {
  int head;
  int split;
  int begin;
  int end;

  __device__ KeySpan(int block, int past) : head(block / kSplits), split(block % kSplits) {
    const int each = (past + kSplits - 1) / kSplits;
    begin = min(past, split * each);
    end = min(past, begin + each);
  }
};

/// The page in the cache that holds a page of the sequence.
__device__ inline std::int32_t page_of(const Parameters& p, int page) {
  return p.page_table[p.sequence->slot * p.page_table_stride + page];
}

/// The lane that fills the ring. One stage is on its way at a time: more bytes under way make every
/// word of the exchange slower, which costs more than the waits.
class Producer {
 public:
  __device__ Producer(const Parameters& parameters, const Ring& ring, std::uint32_t stages)
      : p_(parameters),
        full_(shared_address(ring.full)),
        empty_(shared_address(ring.empty)),
        stages_(stages) {}

  __device__ void run(const Sources& from, const KeySpan& keys) {
    const int piece_bytes = p_.col_blocks * kBlockBytes;
#pragma unroll 1
    for (int i = 0; i < p_.layers * kProjections; ++i) {
      const int layer = i / kProjections;
      const int projection = i % kProjections;
      const std::uint8_t* source = from.weights[i];
      if (projection == kQkv) {
        prefetch_constants(layer);
      }
      if (projection == kOut && keys.head < p_.heads) {
        bring_keys(layer, keys, from.pages);
      }
      const int pieces = projection == kDown ? kPieces : 1;
      source += static_cast<std::int64_t>(from.units[projection][0]) * pieces * piece_bytes;
      const int count = (from.units[projection][1] - from.units[projection][0]) * pieces;
#pragma unroll 1
      for (int piece = 0; piece < count; ++piece) {
        begin(piece_bytes);
        bulk_copy(stages_ + stage_ * kStageBytes, source, piece_bytes, full_ + 8 * stage_);
        source += piece_bytes;
        end();
      }
    }
  }

 private:
  /// A thread block's share of the next layer's constants goes to L2, where they are found behind
  /// the weights that memory is busy with.
  __device__ void prefetch_constants(int layer) const {
    if (layer == 0) {
      prefetch(p_.rows, kLayerRows * p_.hidden * sizeof(float2));
      prefetch(p_.norms, 4 * p_.hidden * sizeof(float));
    }
    if (layer + 1 < p_.layers) {
      prefetch(p_.rows + static_cast<std::int64_t>(layer + 1) * kLayerRows * p_.hidden,
               kLayerRows * p_.hidden * sizeof(float2));
      prefetch(p_.norms + static_cast<std::int64_t>(layer + 1) * p_.hidden,
               4 * p_.hidden * sizeof(float));
    }
  }
  __device__ static void prefetch(const void* from, std::size_t bytes) {
    const std::size_t each = (bytes + gridDim.x - 1) / gridDim.x;
    const std::size_t share = (each + 15) / 16 * 16;
    const std::size_t first = blockIdx.x * share;
    if (first < bytes) {
      const auto size = static_cast<std::uint32_t>(min(share, bytes - first));
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                       static_cast<const char*>(from) + first),
                   "r"(size)
                   : "memory");
    }
  }

  /// Keys, then values of as many tokens as a stage holds.
  __device__ void bring_keys(int layer, const KeySpan& span, const std::int32_t* held) {
    const std::uint16_t* const keys = p_.keys + layer * p_.cache_stride;
    const std::uint16_t* const values = p_.values + layer * p_.cache_stride;
    constexpr int kPage = static_cast<int>(kPageTokens);
    for (int first = span.begin; first < span.end; first += kStageKeys) {
      const int count = min(kStageKeys, span.end - first);
      begin(count * 2 * kHeadBytes);
      for (int i = 0; i < count;) {
        const int key = first + i;
        const int run = min(count - i, kPage - key % kPage);
        const int page = key / kPage - span.begin / kPage;
        const std::int32_t place = page < kHeldPages ? held[page] : page_of(p_, key / kPage);
        const std::int64_t offset =
            ((static_cast<std::int64_t>(place) * p_.heads + span.head) * kPage + key % kPage) *
            kHeadDim;
        const std::uint32_t target = stages_ + stage_ * kStageBytes + i * kHeadBytes;
        bulk_copy(target, keys + offset, run * kHeadBytes, full_ + 8 * stage_);
        bulk_copy(target + count * kHeadBytes, values + offset, run * kHeadBytes,
                  full_ + 8 * stage_);
        i += run;
      }
      end();
    }
  }

  __device__ void begin(int bytes) {
    wait_barrier(empty_ + 8 * stage_, parity_);
    wait_barrier(full_ + 8 * last_, last_parity_);
    if (++last_ == kStages) {
      last_ = 0;
      last_parity_ ^= 1;
    }
    expect_bytes(full_ + 8 * stage_, bytes);
  }
  __device__ void end() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  const Parameters& p_;
  std::uint32_t full_;
  std::uint32_t empty_;
  std::uint32_t stages_;
  int stage_ = 0;
  std::uint32_t parity_ = 1;  // of a phase that has not begun: a fresh stage is free
  int last_ = kStages - 1;    // the stage filled before
  std::uint32_t last_parity_ = 1;
};

#endif

}  // namespace moq::kernels::cuda::step
