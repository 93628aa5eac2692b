// Reading device memory as fast as it goes, and doing next to nothing with it.
#include "kernels/cuda/bandwidth.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

__device__ std::uint64_t fold(ulonglong2 words) {
  return words.x ^ words.y;
}

__device__ std::uint64_t warp_exclusive_or(std::uint64_t value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value ^= __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

/// Adds what the threads of a block have found to the result, which kernels ahead may still use.
__device__ void finish(std::uint64_t found, std::uint64_t* exclusive_or) {
  __shared__ std::uint64_t of_warp[kWarps];
  found = warp_exclusive_or(found);
  if (threadIdx.x % kWarpSize == 0) {
    of_warp[threadIdx.x / kWarpSize] = found;
  }
  __syncthreads();
  wait_for_previous_kernels();
  if (threadIdx.x == 0) {
    found = 0;
    for (const std::uint64_t one : of_warp) {
      found ^= one;
    }
    atomicXor(reinterpret_cast<unsigned long long*>(exclusive_or), found);
  }
}

/// The exclusive or of the words of a row that kernels ahead write: each warp looks at all of it.
__device__ std::uint64_t sum_of_row(const ulonglong2* row, std::int64_t pairs) {
  wait_for_previous_kernels();
  std::uint64_t sum = 0;
#pragma unroll 8
  for (std::int64_t i = threadIdx.x % kWarpSize; i < pairs; i += kWarpSize) {
    sum ^= fold(row[i]);
  }
  return warp_exclusive_or(sum);
}

// -------------------------------------------------------------------------------------- plain
// loads

constexpr int kLoads = 8;  // of a thread at a time, 16 bytes each
constexpr int kBlocksPerMultiprocessor = 8;

template <bool kAfterRow>
__global__ void __launch_bounds__(kThreads)
    read_plain(const ulonglong2* pairs, std::int64_t num_pairs, const ulonglong2* row,
               std::int64_t row_pairs, std::uint64_t* exclusive_or) {
  constexpr std::int64_t kSpan = std::int64_t{kThreads} * kLoads;
  allow_next_kernel();
  std::uint64_t found = 0;
  std::uint64_t of_row = 0;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kSpan; first < num_pairs;
       first += gridDim.x * kSpan) {
    ulonglong2 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t at = first + i * kThreads + threadIdx.x;
      loaded[i] = at < num_pairs ? __ldcs(pairs + at) : ulonglong2{0, 0};
    }
    if (kAfterRow && first < static_cast<std::int64_t>(gridDim.x) * kSpan) {
      of_row = sum_of_row(row, row_pairs);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t at = first + i * kThreads + threadIdx.x;
      found ^= fold(loaded[i]) ^ (kAfterRow && at < num_pairs ? of_row : 0);
    }
  }
  finish(found, exclusive_or);
}

// -------------------------------------------------------------------------------------- bulk
// copies

constexpr int kStages = 6;  // the next kernel's block has room beside this one's
constexpr std::int64_t kStageBytes = 16 << 10;
constexpr std::size_t kRingBytes = kStages * kStageBytes;

/// A block keeps kStages copies under way; chunk c of a block is chunk c * blocks + block of all.
__global__ void __launch_bounds__(kThreads)
    read_bulk(const char* buffer, std::int64_t bytes, std::uint64_t* exclusive_or) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char ring[];
  __shared__ std::uint64_t barriers[kStages];
  allow_next_kernel();
  const std::int64_t chunks = (bytes + kStageBytes - 1) / kStageBytes;
  const auto size_of_chunk = [&](std::int64_t chunk) {
    const std::int64_t left = bytes - chunk * kStageBytes;
    return static_cast<std::uint32_t>(left < kStageBytes ? left : kStageBytes);
  };
  const auto request = [&](std::int64_t chunk, int stage) {
    if (threadIdx.x == 0 && chunk < chunks) {
      const std::uint32_t barrier = shared_address(barriers + stage);
      expect_bytes(barrier, size_of_chunk(chunk));
      bulk_copy(shared_address(ring + stage * kStageBytes), buffer + chunk * kStageBytes,
                size_of_chunk(chunk), barrier);
    }
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared_address(barriers + stage));
    }
    publish_barriers();
  }
  __syncthreads();
  const std::int64_t blocks = gridDim.x;
  for (int stage = 0; stage < kStages; ++stage) {
    request(blockIdx.x + stage * blocks, stage);
  }
  std::uint64_t found = 0;
  int stage = 0;
  std::uint32_t parity = 0;
  for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += blocks) {
    wait_barrier(shared_address(barriers + stage), parity);
    const auto* pairs = reinterpret_cast<const ulonglong2*>(ring + stage * kStageBytes);
    for (std::uint32_t i = threadIdx.x; i < size_of_chunk(chunk) / 16; i += kThreads) {
      found ^= fold(pairs[i]);
    }
    __syncthreads();  // the stage has been read: it may be written again
    request(chunk + kStages * blocks, stage);
    stage = (stage + 1) % kStages;
    parity ^= stage == 0 ? 1U : 0U;
  }
  finish(found, exclusive_or);
#endif
}

// ------------------------------------------------------------------------------ bulk copies,
// looked at behind a row

constexpr int kRowStages = 13;  // of a warp; the next kernel's block has room beside this one's
constexpr int kRowStageBytes = 1 << 10;
constexpr int kRowAheadBytes = 16 << 10;  // of a warp, which come to the second-level cache

/// As a product's warps do: each brings its part of the buffer through a ring of its own, filled
/// before it waits for the row; what comes behind is in the second-level cache by then.
__global__ void __launch_bounds__(kThreads)
    read_behind_row(const char* buffer, std::int64_t bytes, const ulonglong2* row,
                    std::int64_t row_pairs, std::uint64_t* exclusive_or) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char rings[];
  __shared__ std::uint64_t barriers[kWarps][kRowStages];
  allow_next_kernel();
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t chunks = (bytes + kRowStageBytes - 1) / kRowStageBytes;
  const std::int64_t parts = std::int64_t{gridDim.x} * kWarps;
  const std::int64_t part = std::int64_t{blockIdx.x} * kWarps + warp;
  const std::int64_t begin = part * chunks / parts * kRowStageBytes;
  const std::int64_t end = min((part + 1) * chunks / parts * kRowStageBytes, bytes);
  const std::uint32_t ring = shared_address(rings) + warp * kRowStages * kRowStageBytes;
  const std::uint32_t barrier = shared_address(barriers[warp]);
  const auto size_at = [&](std::int64_t at) {
    return static_cast<std::uint32_t>(min(end - at, std::int64_t{kRowStageBytes}));
  };
  const auto request = [&](std::int64_t at, int stage) {
    if (at < end && elect_lane()) {
      expect_bytes(barrier + 8 * stage, size_at(at));
      bulk_copy(ring + stage * kRowStageBytes, buffer + at, size_at(at), barrier + 8 * stage);
    }
  };
  if (lane < kRowStages) {
    init_barrier(barrier + 8 * lane);
  }
  publish_own_barriers();
  __syncwarp();
  for (int stage = 0; stage < kRowStages; ++stage) {
    request(begin + stage * kRowStageBytes, stage);
  }
  const std::int64_t ahead = begin + kRowStages * kRowStageBytes;
  if (ahead < end && elect_lane()) {
    prefetch_bytes(buffer + ahead,
                   static_cast<std::uint32_t>(min(end - ahead, std::int64_t{kRowAheadBytes})));
  }
  const std::uint64_t of_row = sum_of_row(row, row_pairs);
  std::uint64_t found = 0;
  int stage = 0;
  std::uint32_t parity = 0;
  for (std::int64_t at = begin; at < end; at += kRowStageBytes) {
    wait_barrier(barrier + 8 * stage, parity);
    const auto* pairs =
        reinterpret_cast<const ulonglong2*>(rings + (warp * kRowStages + stage) * kRowStageBytes);
    for (std::uint32_t i = lane; i < size_at(at) / 16; i += kWarpSize) {
      found ^= fold(pairs[i]) ^ of_row;
    }
    __syncwarp();  // the stage has been read: it may be written again
    request(at + kRowStages * kRowStageBytes, stage);
    if (++stage == kRowStages) {
      stage = 0;
      parity ^= 1U;
    }
  }
  finish(found, exclusive_or);
#endif
}

template <bool kAfterRow>
void launch_plain(const void* buffer, std::int64_t bytes, const ulonglong2* row,
                  std::int64_t row_pairs, std::uint64_t* exclusive_or, cudaStream_t stream) {
  const std::int64_t pairs = bytes / 16;
  const std::int64_t spans = (pairs + kThreads * kLoads - 1) / (kThreads * kLoads);
  const std::int64_t blocks =
      std::min(device_limits().multiprocessors * kBlocksPerMultiprocessor, spans);
  launch(read_plain<kAfterRow>, static_cast<unsigned>(blocks), kThreads, 0, stream,
         static_cast<const ulonglong2*>(buffer), pairs, row, row_pairs, exclusive_or);
}

bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace

void read(const void* buffer, std::size_t bytes, bool bulk, const void* row, std::size_t row_bytes,
          std::uint64_t* exclusive_or, cudaStream_t stream) {
  MOQ_CHECK(bytes > 0 && bytes % 16 == 0,
            "read: the buffer's size must be a positive multiple of 16 bytes, got ", bytes);
  MOQ_CHECK(buffer != nullptr && is_aligned(buffer),
            "read: the buffer must be aligned to 16 bytes, got ", buffer);
  MOQ_CHECK(row_bytes % 16 == 0, "read: the row's size must be a multiple of 16 bytes, got ",
            row_bytes);
  MOQ_CHECK(row_bytes == 0 || (row != nullptr && is_aligned(row)),
            "read: the row must be aligned to 16 bytes, got ", row);
  MOQ_CHECK(exclusive_or != nullptr, "read: exclusive_or must not be null");
  const auto size = static_cast<std::int64_t>(bytes);
  const auto* bytes_of_buffer = static_cast<const char*>(buffer);
  const auto* first_of_row = static_cast<const ulonglong2*>(row);
  const auto row_pairs = static_cast<std::int64_t>(row_bytes / 16);
  const auto blocks_of = [](std::int64_t parts) {
    return static_cast<unsigned>(std::min<std::int64_t>(device_limits().multiprocessors, parts));
  };
  if (!bulk || architecture_of(read_bulk) < 90) {
    const auto launch_it = row_pairs > 0 ? launch_plain<true> : launch_plain<false>;
    launch_it(buffer, size, first_of_row, row_pairs, exclusive_or, stream);
  } else if (row_pairs == 0) {
    launch(read_bulk, blocks_of((size + kStageBytes - 1) / kStageBytes), kThreads, kRingBytes,
           stream, bytes_of_buffer, size, exclusive_or);
  } else {
    launch(read_behind_row, blocks_of((size + kRowStageBytes - 1) / kRowStageBytes), kThreads,
           std::size_t{kWarps * kRowStages * kRowStageBytes}, stream, bytes_of_buffer, size,
           first_of_row, row_pairs, exclusive_or);
  }
}

}  // namespace moq::kernels::cuda
