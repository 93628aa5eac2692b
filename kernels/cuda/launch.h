#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"

namespace moq::kernels::cuda {

/// Whether kernels may start before those ahead of them in a stream have ended (compute capability
/// 9.0). MOQ_GPU_OVERLAP=0 forbids it.
bool kernels_may_overlap();

/// @throws moq::Error that names the kernel, its thread blocks, the device and the runtime's words
[[noreturn]] void fail_launch(cudaError_t status, const void* kernel,
                              const cudaLaunchConfig_t& config);

/// Keeps the name of a kernel for fail_launch: after some errors CUDA tells none.
void remember_name(const void* kernel);

/// Starts a kernel.
/// @throws as fail_launch
template <typename... Parameters, typename... Arguments>
void launch_kernel(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  const auto* const symbol = reinterpret_cast<const void*>(kernel);
  remember_name(symbol);
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (status != cudaSuccess) [[unlikely]] {
    fail_launch(status, symbol, config);
  }
}

/// Starts a kernel that begins when those ahead of it in the stream have ended.
template <typename... Parameters, typename... Arguments>
void launch_in_order(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                     Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  launch_kernel(config, kernel, std::forward<Arguments>(arguments)...);
}

/// Starts a kernel that calls wait_for_previous_kernels() before it reads what kernels ahead wrote,
/// or writes what they read, and allow_next_kernel() when the next one may start.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  constexpr std::size_t kSharedWithoutAsking = 48 << 10;
  if (shared_bytes > kSharedWithoutAsking) {
    MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = kernels_may_overlap() && architecture_of(kernel) >= 90 ? 1 : 0;
  launch_kernel(config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace moq::kernels::cuda
