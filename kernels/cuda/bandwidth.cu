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
  wait_for_previous_kernels();
  found = warp_exclusive_or(found);
  if (threadIdx.x % kWarpSize == 0) {
    atomicXor(reinterpret_cast<unsigned long long*>(exclusive_or), found);
  }
}

/// The exclusive or of the words of a row that kernels ahead write, for all threads of a block.
__device__ std::uint64_t sum_of_row(const ulonglong2* row, std::int64_t pairs) {
  __shared__ std::uint64_t sums[kThreads / kWarpSize];
  wait_for_previous_kernels();
  std::uint64_t sum = 0;
  for (std::int64_t i = threadIdx.x; i < pairs; i += kThreads) {
    sum ^= fold(row[i]);
  }
  sum = warp_exclusive_or(sum);
  if (threadIdx.x % kWarpSize == 0) {
    sums[threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  sum = 0;
  for (const std::uint64_t of_warp : sums) {
    sum ^= of_warp;
  }
  return sum;
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

constexpr int kStages = 6;       // the next kernel's block has room beside this one's
constexpr int kAheadStages = 4;  // that come to the second-level cache while a row is waited for
constexpr std::int64_t kStageBytes = 16 << 10;
constexpr std::size_t kRingBytes = kStages * kStageBytes;

/// A block keeps kStages copies under way; chunk c of a block is chunk c * blocks + block of all.
template <bool kAfterRow>
__global__ void __launch_bounds__(kThreads)
    read_bulk(const char* buffer, std::int64_t bytes, const ulonglong2* row, std::int64_t row_pairs,
              std::uint64_t* exclusive_or) {
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
  std::uint64_t of_row = 0;
  if constexpr (kAfterRow) {
    for (int ahead = 0; ahead < kAheadStages; ++ahead) {
      const std::int64_t chunk = blockIdx.x + (kStages + ahead) * blocks;
      if (threadIdx.x == 0 && chunk < chunks) {
        prefetch_bytes(buffer + chunk * kStageBytes, size_of_chunk(chunk));
      }
    }
    of_row = sum_of_row(row, row_pairs);
  }
  std::uint64_t found = 0;
  int stage = 0;
  std::uint32_t parity = 0;
  for (std::int64_t chunk = blockIdx.x; chunk < chunks; chunk += blocks) {
    wait_barrier(shared_address(barriers + stage), parity);
    const auto* pairs = reinterpret_cast<const ulonglong2*>(ring + stage * kStageBytes);
    for (std::uint32_t i = threadIdx.x; i < size_of_chunk(chunk) / 16; i += kThreads) {
      found ^= fold(pairs[i]) ^ of_row;
    }
    __syncthreads();  // the stage has been read: it may be written again
    request(chunk + kStages * blocks, stage);
    stage = (stage + 1) % kStages;
    parity ^= stage == 0 ? 1U : 0U;
  }
  finish(found, exclusive_or);
#endif
}

template <bool kAfterRow>
void launch_read(const void* buffer, std::int64_t bytes, bool bulk, const void* row,
                 std::int64_t row_bytes, std::uint64_t* exclusive_or, cudaStream_t stream) {
  const std::int64_t multiprocessors = device_limits().multiprocessors;
  const auto* row_begin = static_cast<const ulonglong2*>(row);
  const std::int64_t row_pairs = row_bytes / 16;
  if (bulk && architecture_of(read_bulk<kAfterRow>) >= 90) {
    const std::int64_t blocks = std::min(multiprocessors, (bytes + kStageBytes - 1) / kStageBytes);
    launch(read_bulk<kAfterRow>, static_cast<unsigned>(blocks), kThreads, kRingBytes, stream,
           static_cast<const char*>(buffer), bytes, row_begin, row_pairs, exclusive_or);
  } else {
    const std::int64_t pairs = bytes / 16;
    const std::int64_t spans = (pairs + kThreads * kLoads - 1) / (kThreads * kLoads);
    const std::int64_t blocks = std::min(multiprocessors * kBlocksPerMultiprocessor, spans);
    launch(read_plain<kAfterRow>, static_cast<unsigned>(blocks), kThreads, 0, stream,
           static_cast<const ulonglong2*>(buffer), pairs, row_begin, row_pairs, exclusive_or);
  }
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
  const auto launch_it = row_bytes > 0 ? launch_read<true> : launch_read<false>;
  launch_it(buffer, static_cast<std::int64_t>(bytes), bulk, row,
            static_cast<std::int64_t>(row_bytes), exclusive_or, stream);
}

}  // namespace moq::kernels::cuda
