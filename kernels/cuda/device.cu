#include "kernels/cuda/device.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.h"

namespace moq::kernels::cuda {
namespace {

constexpr std::int64_t kReservedBytes = 1 << 10;  // of each block's shared memory, by the system

/// Tells whether any kernel of this build loads on a device.
__global__ void probe_kernel() {}

int current_device() {
  int device = 0;
  MOQ_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

/// make(), once for each key.
template <typename Key, typename Make>
auto remembered(const Key& key, const Make& make) {
  static std::mutex mutex;
  static std::map<Key, decltype(make())> known;
  const std::scoped_lock lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, make()).first->second;
}

/// Takes every `part` out of a name.
void drop(std::string_view part, std::string& name) {
  for (std::size_t at = name.find(part); at != std::string::npos; at = name.find(part, at)) {
    name.erase(at, part.size());
  }
}

/// A kernel's name with its template arguments, without namespaces and parameters.
std::string name_of(const void* kernel) {
  return remembered(kernel, [&]() -> std::string {
    const char* mangled = nullptr;
    if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) {
      (void)cudaGetLastError();
      return "without a name";
    }
    const std::unique_ptr<char, decltype(&std::free)> demangled(
        abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr), &std::free);
    std::string name = demangled ? demangled.get() : mangled;
    for (const char* part : {"moq::", "kernels::", "cuda::", "(anonymous namespace)::"}) {
      drop(part, name);
    }
    int depth = 0;  // within template arguments
    const auto parameters = std::ranges::find_if(name, [&](char c) {
      depth += (c == '<') - (c == '>');
      return c == '(' && depth == 0;
    });
    name.erase(parameters, name.end());
    return name.starts_with("void ") ? name.substr(5) : name;
  });
}

/// Whether a kernel that had begun met the error: it may be an earlier one than the one whose
/// launch returns it.
bool is_met_while_running(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

bool launches_block() {
  const char* blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
  return blocking != nullptr && std::atoi(blocking) != 0;
}

std::string in_words(dim3 size) {
  std::string words = std::to_string(size.x);
  if (size.y > 1 || size.z > 1) {
    words += " x " + std::to_string(size.y);
  }
  return size.z > 1 ? words + " x " + std::to_string(size.z) : words;
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

void remember_name(const void* kernel) {
  (void)name_of(kernel);
}

void fail_launch(cudaError_t status, const void* kernel, const cudaLaunchConfig_t& config) {
  (void)cudaGetLastError();  // an error of the launch alone shall not show in the next call
  int device = -1;
  (void)cudaGetDevice(&device);
  const bool is_of_another = is_met_while_running(status) && !launches_block();
  detail::fail("CUDA: kernel ", name_of(kernel), " must run as ", in_words(config.gridDim),
               " thread blocks of ", in_words(config.blockDim), " threads and ",
               config.dynamicSmemBytes, " bytes of shared memory on GPU ", device, ", got \"",
               cudaGetErrorString(status), '"',
               is_of_another ? ", which a kernel before it may have met: CUDA_LAUNCH_BLOCKING=1 "
                               "tells which"
                             : "");
}

bool kernels_may_overlap() {
  static const char* const forbidden = std::getenv("MOQ_GPU_OVERLAP");
  return forbidden == nullptr || std::atoi(forbidden) != 0;
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
