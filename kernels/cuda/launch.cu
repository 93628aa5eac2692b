#include "kernels/cuda/launch.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

#include "kernels/common/check.h"
#include "kernels/cuda/remembered.h"

namespace moq::kernels::cuda {
namespace {

/// Takes every `part` out of a name.
void drop(std::string_view part, std::string& name) {
  for (std::size_t at = name.find(part); at != std::string::npos; at = name.find(part, at)) {
    name.erase(at, part.size());
  }
}

/// A kernel's name with its template arguments, without namespaces and parameters.
const std::string& name_of(const void* kernel) {
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

}  // namespace

bool kernels_may_overlap() {
  static const char* const forbidden = std::getenv("MOQ_GPU_OVERLAP");
  return forbidden == nullptr || std::atoi(forbidden) != 0;
}

void remember_name(const void* kernel) {
  (void)name_of(kernel);
}

void fail_launch(cudaError_t status, const void* kernel, const cudaLaunchConfig_t& config) {
  (void)cudaGetLastError();  // an error of the launch alone shall not show in the next call
  int device = -1;
  (void)cudaGetDevice(&device);
  const bool may_be_of_another = is_met_while_running(status) && !launches_block();
  detail::fail("CUDA: kernel ", name_of(kernel), " must run as ", in_words(config.gridDim),
               " thread blocks of ", in_words(config.blockDim), " threads and ",
               config.dynamicSmemBytes, " bytes of dynamic shared memory on GPU ", device,
               ", got \"", cudaGetErrorString(status), '"',
               may_be_of_another
                   ? ", which a kernel before it may have met: CUDA_LAUNCH_BLOCKING=1 "
                     "tells which"
                   : "");
}

}  // namespace moq::kernels::cuda
