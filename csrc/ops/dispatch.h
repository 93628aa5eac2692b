#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <type_traits>

#include "kernels/common/parallel.h"

#if defined(MOQ_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

/// How operators get to their kernels, and past autograd.
namespace moq::ops {

/// Calls on_cpu() on torch's threads, or on_cuda(stream) with the device's current stream.
/// @throws NotImplementedError (Python's) naming `where`, for a device that has no kernels.
template <typename OnCpu, typename OnCuda>
void run_on(const char* where, at::Device device, const OnCpu& on_cpu,
            [[maybe_unused]] const OnCuda& on_cuda) {
  if (device.is_cpu()) {
    const kernels::ThreadScope threads(at::get_num_threads());
    return on_cpu();
  }
#if defined(MOQ_WITH_CUDA)
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return on_cuda(c10::cuda::getCurrentCUDAStream().stream());
  }
  constexpr const char* kDevices = "the CPU or a CUDA device";
#else
  constexpr const char* kDevices = "the CPU (moq was built without CUDA)";
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, where, ": tensors must be on ", kDevices, ", got ", device,
                              "; move them there");
}

/// Calls an operator below autograd: its results are integers, or constants.
template <auto* kOperator, typename... Arguments>
auto without_gradient(const char* name, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<std::remove_pointer_t<decltype(kOperator)>>()
      .call(arguments...);
}

/// An operator whose arguments kDescribe checks and turns into a call: on a device kRun computes
/// its result; without one, where only sizes are wanted, kEmpty makes one of the same sizes.
template <auto* kDescribe, auto* kRun, auto* kEmpty,
          typename = std::remove_pointer_t<decltype(kDescribe)>>
struct Described;
template <auto* kDescribe, auto* kRun, auto* kEmpty, typename Call, typename... Arguments>
struct Described<kDescribe, kRun, kEmpty, Call(Arguments...)> {
  static auto on_device(Arguments... arguments) { return kRun(kDescribe(arguments...)); }
  static auto on_meta(Arguments... arguments) { return kEmpty(kDescribe(arguments...)); }
};

}  // namespace moq::ops
