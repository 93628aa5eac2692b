#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

/// What launchers ask of the current device. Answers are remembered.
namespace moq::kernels::cuda {

struct DeviceLimits {
  std::int64_t multiprocessors;
  std::int64_t shared_bytes_per_multiprocessor;
};

DeviceLimits device_limits();

/// Shared memory of a multiprocessor of compute capability 9.0, and what the system takes of it for
/// each block.
constexpr int kHopperSharedBytes = 228 << 10;
constexpr int kReservedBytes = 1 << 10;

/// Whether a thread block may have so much shared memory.
bool fits_in_shared(std::int64_t bytes);

/// What a block may have on every GPU that moq runs on: 8.6 and 8.9 have least.
constexpr std::int64_t kLeastSharedBytes = 99 << 10;

/// @throws moq::Error, with the remedy, if moq was not built for the current device.
void check_device();

/// The architecture (80, 90, …) that the code of a kernel was written for as it is loaded on the
/// current device: that of its PTX where the driver compiled it. The environment variable
/// MOQ_GPU_ARCH lowers it, so that a newer GPU can take an older one's path, with the shared memory
/// of that if it is 86 or 89.
int architecture_of(const void* kernel);

template <typename... Arguments>
int architecture_of(void (*kernel)(Arguments...)) {
  return architecture_of(reinterpret_cast<const void*>(kernel));
}

/// Clusters of thread blocks of a kernel that run at once on the current device; the grid of config
/// is one cluster.
std::int64_t active_clusters(const void* kernel, const cudaLaunchConfig_t& config);

template <typename... Arguments>
std::int64_t active_clusters(void (*kernel)(Arguments...), const cudaLaunchConfig_t& config) {
  return active_clusters(reinterpret_cast<const void*>(kernel), config);
}

/// As active_clusters.
/// @throws moq::Error, with the remedy, if there is no room for any
std::int64_t required_clusters(const void* kernel, const cudaLaunchConfig_t& config);

template <typename... Arguments>
std::int64_t required_clusters(void (*kernel)(Arguments...), const cudaLaunchConfig_t& config) {
  return required_clusters(reinterpret_cast<const void*>(kernel), config);
}

}  // namespace moq::kernels::cuda
