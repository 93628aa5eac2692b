#include "kernels/cuda/device.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <tuple>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/remembered.h"

namespace moq::kernels::cuda {
namespace {

/// Tells whether any kernel of this build loads on a device.
__global__ void probe_kernel() {}

int current_device() {
  int device = 0;
  MOQ_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

/// What MOQ_GPU_ARCH says, or a number above all architectures.
int forced_architecture() {
  const char* forced = std::getenv("MOQ_GPU_ARCH");
  return forced == nullptr ? std::numeric_limits<int>::max() : std::atoi(forced);
}

}  // namespace

DeviceLimits device_limits() {
  const int device = current_device();
  return remembered(device, [&] {
    int multiprocessors = 0;
    int shared_bytes = 0;
    MOQ_CUDA_CHECK(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    MOQ_CUDA_CHECK(
        cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    const int forced = forced_architecture();
    if (forced == 86 || forced == 89) {
      shared_bytes = std::min(shared_bytes, static_cast<int>(kLeastSharedBytes + kReservedBytes));
    }
    return DeviceLimits{multiprocessors, shared_bytes};
  });
}

bool fits_in_shared(std::int64_t bytes) {
  return bytes + kReservedBytes <= device_limits().shared_bytes_per_multiprocessor;
}

void check_device() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) {
    return;
  }
  (void)cudaGetLastError();
  cudaDeviceProp properties{};
  MOQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, current_device()));
  MOQ_CHECK(false, "CUDA: the GPU must be one that moq was built for, got ", properties.name,
            " of compute capability ", properties.major, ".", properties.minor, " (",
            cudaGetErrorString(status),
            "): build moq again with MOQ_CUDA_ARCHITECTURES=", properties.major, properties.minor,
            properties.major == 9 ? "a" : "", " (80 is the oldest)");
}

int architecture_of(const void* kernel) {
  return remembered(std::pair(current_device(), kernel), [&] {
    cudaFuncAttributes attributes{};
    MOQ_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return std::min(attributes.ptxVersion, forced_architecture());
  });
}

std::int64_t active_clusters(const void* kernel, const cudaLaunchConfig_t& config) {
  const unsigned blocks = config.gridDim.x * config.gridDim.y * config.gridDim.z;
  return remembered(std::tuple(current_device(), kernel, config.dynamicSmemBytes, blocks), [&] {
    int clusters = 0;
    MOQ_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    return static_cast<std::int64_t>(clusters);
  });
}

std::int64_t required_clusters(const void* kernel, const cudaLaunchConfig_t& config) {
  const std::int64_t clusters = active_clusters(kernel, config);
  MOQ_CHECK(clusters > 0, "linear: the GPU must be able to run clusters of ", config.gridDim.x,
            " thread blocks with ", config.dynamicSmemBytes >> 10,
            " KiB of shared memory each, got none: give the process a larger share of the GPU, or "
            "set MOQ_GPU_ARCH=80");
  return clusters;
}

}  // namespace moq::kernels::cuda
