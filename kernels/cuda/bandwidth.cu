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

/// Adds what the threads of a block have found to the result, which kernels ahead may still use: a
/// block once, since additions to one place wait for each other.
__device__ void finish(std::uint64_t found, std::uint64_t* exclusive_or) {
  __shared__ std::uint64_t of_warp[kThreads / kWarpSize];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    found ^= __shfl_xor_sync(0xffffffffU, found, offset);
  }
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

// -------------------------------------------------------------------------------------- plain
// loads

constexpr int kLoads = 8;  // of a thread at a time, 16 bytes each
constexpr int kBlocksPerMultiprocessor = 8;

__global__ void __launch_bounds__(kThreads)
    read_plain(const ulonglong2* pairs, std::int64_t num_pairs, std::uint64_t* exclusive_or) {
  constexpr std::int64_t kSpan = std::int64_t{kThreads} * kLoads;
  allow_next_kernel();
  std::uint64_t found = 0;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kSpan; first < num_pairs;
       first += gridDim.x * kSpan) {
    ulonglong2 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t at = first + i * kThreads + threadIdx.x;
      loaded[i] = at < num_pairs ? __ldcs(pairs + at) : ulonglong2{0, 0};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      found ^= fold(loaded[i]);
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

}  // namespace

void read(const void* buffer, std::size_t bytes, bool bulk, std::uint64_t* exclusive_or,
          cudaStream_t stream) {
  MOQ_CHECK(bytes > 0 && bytes % 16 == 0,
            "read: the buffer's size must be a positive multiple of 16 bytes, got ", bytes);
  MOQ_CHECK(buffer != nullptr && reinterpret_cast<std::uintptr_t>(buffer) % 16 == 0,
            "read: the buffer must be aligned to 16 bytes, got ", buffer);
  MOQ_CHECK(exclusive_or != nullptr, "read: exclusive_or must not be null");
  const auto size = static_cast<std::int64_t>(bytes);
  const std::int64_t multiprocessors = device_limits().multiprocessors;
  if (bulk && architecture_of(read_bulk) >= 90) {
    const std::int64_t blocks = std::min(multiprocessors, (size + kStageBytes - 1) / kStageBytes);
    launch(read_bulk, static_cast<unsigned>(blocks), kThreads, kRingBytes, stream,
           static_cast<const char*>(buffer), size, exclusive_or);
  } else {
    const std::int64_t pairs = size / 16;
    const std::int64_t spans = (pairs + kThreads * kLoads - 1) / (kThreads * kLoads);
    const std::int64_t blocks = std::min(multiprocessors * kBlocksPerMultiprocessor, spans);
    launch(read_plain, static_cast<unsigned>(blocks), kThreads, 0, stream,
           static_cast<const ulonglong2*>(buffer), pairs, exclusive_or);
  }
}

}  // namespace moq::kernels::cuda
