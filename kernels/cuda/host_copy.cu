#include "kernels/cuda/host_copy.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = 256;

/// What the host wrote before the launch is read while kernels ahead end, which may read `to`.
__global__ void __launch_bounds__(kThreads)
    copy_from_host_kernel(uint4* to, const uint4* host, std::int64_t count) {
  allow_next_kernel();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  // (Not through a cache that an earlier copy from the same place may have filled.)
  const uint4 value = i < count ? __ldcv(host + i) : uint4{};
  wait_for_previous_kernels();
  if (i < count) {
    to[i] = value;
  }
}

}  // namespace

void copy_from_host(void* to, const void* host, std::size_t bytes, cudaStream_t stream) {
  if (bytes == 0) {
    return;
  }
  constexpr std::size_t kUnit = sizeof(uint4);
  MOQ_CHECK(to != nullptr && host != nullptr, "copy_from_host: no pointer must be null");
  MOQ_CHECK(
      (reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(host) | bytes) %
              kUnit ==
          0,
      "copy_from_host: addresses and bytes must be multiples of ", kUnit, ", got ", to, ", ", host,
      " and ", bytes, " bytes");
  cudaPointerAttributes attributes{};
  MOQ_CUDA_CHECK(cudaPointerGetAttributes(&attributes, host));
  MOQ_CHECK(attributes.type == cudaMemoryTypeHost && attributes.devicePointer != nullptr,
            "copy_from_host: the host's memory must be page-locked, got ", host);
  const auto count = static_cast<std::int64_t>(bytes / kUnit);
  launch(copy_from_host_kernel, dim3(static_cast<unsigned>(divide_up(count, kThreads))),
         dim3(kThreads), 0, stream, static_cast<uint4*>(to),
         static_cast<const uint4*>(attributes.devicePointer), count);
}

}  // namespace moq::kernels::cuda
